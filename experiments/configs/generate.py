"""A model, a picture and a question -> text."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "generate",
            "model": config_dict.placeholder(str),  # any supported folder or name on the hub
            "image": config_dict.placeholder(str),  # one picture; none asks about text alone
            "video": config_dict.placeholder(str),  # in place of a picture
            "frames": 8,  # taken from the video
            "pool": 2,  # visual tokens of a frame that become one; 1 keeps all
            "prompt": config_dict.placeholder(str),  # the question; the template is put around it
            "template": config_dict.placeholder(str),  # default: the checkpoint's
            "max_new_tokens": 64,  # of the answer
            "temperature": 0.0,  # 0: the likeliest token each time
            "top_k": config_dict.placeholder(int),  # likeliest tokens to draw from; default: all
            "top_p": config_dict.placeholder(float),  # their probability together; default: 1
            "seed": 0,  # of the draws
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
