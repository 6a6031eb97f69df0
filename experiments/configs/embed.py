"""A picture and a question -> the embeddings that a merged LLM reads, for servers of plain LLMs."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "embed",
            "model": config_dict.placeholder(str),  # a fused folder, or any other supported
            "image": config_dict.placeholder(str),  # one picture
            "video": config_dict.placeholder(str),  # in place of a picture
            "frames": 8,  # taken from the video
            "pool": 2,  # visual tokens of a frame that become one; 1 keeps all
            "prompt": config_dict.placeholder(str),  # the question; the template is put around it
            "template": config_dict.placeholder(str),  # default: the checkpoint's
            "output": config_dict.placeholder(str),  # a file, .safetensors
            "dtype": config_dict.placeholder(str),  # default: as stored
            # (data, model[, fsdp]) devices; default: one device.
            "mesh": config_dict.placeholder(tuple),
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
        }
    )
