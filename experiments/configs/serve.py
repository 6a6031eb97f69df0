"""A model -> an OpenAI-compatible server at http://host:port/v1."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "serve",
            "model": config_dict.placeholder(str),  # any supported folder or name on the hub
            "name": config_dict.placeholder(str),  # that requests give; default: the folder's
            "host": "127.0.0.1",  # address that it listens at
            "port": 8000,  # 0: any free one
            "template": config_dict.placeholder(str),  # default: the checkpoint's
            "max_new_tokens": 1024,  # of an answer; requests that ask for more get so many
            "batch": 16,  # rows that run together
            "window": 0.005,  # seconds that a request waits for others
            "every": 8,  # tokens from one piece of a streamed answer to the next
            # Compiles for a picture and a short question before it answers, greedy and sampled. The
            # first request with a penalty, log-probabilities or a schema still compiles its own
            # program, in a quarter to a third of what this takes for one number of rows.
            "warm_up": False,
            "queue": 128,  # requests in the house; others get status 429
            "timeout": 600.0,  # seconds for a request
            "grace": 7.0,  # seconds that SIGTERM or Ctrl-C leaves to what runs; a second ends it
            "max_body": 20 << 20,  # bytes of a request
            "max_pixels": 32_000_000,  # of a request's pictures, 3 bytes each while it waits
            "max_queue_pixels": 512_000_000,  # of all requests in the house
            "max_images": 16,  # of a request
            "allow_hosts": (),  # "host" or "host:port" that pictures may be fetched from
            "dtype": config_dict.placeholder(str),  # default: as stored
            # (data, model[, fsdp]) devices; default: one device.
            "mesh": config_dict.placeholder(tuple),
            "int8": False,  # weights of the LLM's products
            "int8_cache": False,  # keys and values of what was read
            # Share of the visual tokens that the LLM reads, (one,) or one a branch; (): all.
            "prune": {"keep": (), "by": "attention", "depth": 2},
            "shard": (),  # (("^branches/", {}),) keeps those parameters whole on every device
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
        }
    )
