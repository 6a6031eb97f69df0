"""A picture and a question -> each model's answer side by side, as a page at http://host:port."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "chat",
            "model": config_dict.placeholder(str),  # any supported folder, or org/name on the hub
            # ("folder", ...) or ("name=folder", ...), shown before `model`; with no model and no
            # member: the shipped clip and dino, and their fusion
            "members": (),
            "host": "127.0.0.1",  # address that the page listens at
            "port": 7860,  # 0: any free one
            "max_new_tokens": 128,  # of an answer; fewer where the context ends
            "every": 4,  # tokens from one piece of an answer to the next
            "max_body": 20 << 20,  # bytes of a picture's file
            "max_pixels": 32_000_000,  # of a picture
            "queue": 16,  # questions that wait; others are told to come back
            "dtype": config_dict.placeholder(str),  # default: as stored
            # (data, model[, fsdp]) devices; default: one device.
            "mesh": config_dict.placeholder(tuple),
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
        }
    )
