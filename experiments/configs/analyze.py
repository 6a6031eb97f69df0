"""The papers' observations on any models: where they look, how alike their features are."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "task": "analyze",
            "model": config_dict.placeholder(str),  # any supported folder, such as a fused one
            # ("folder", ...) or ("name=folder", ...) to compare; with no model and no member: the
            # shipped clip and dino, their fusion, and probes of their encoders' layers
            "members": (),
            "data": config_dict.placeholder(str),  # a folder of pictures, or one; default: scenes
            "prompt": "What is in the picture?",  # asked about all pictures of `data`
            "pictures": 64,  # at most
            "maps": 4,  # pictures whose attention is drawn
            "batch": 8,  # pictures looked at together
            "tsne": False,  # beside the principal components; slow
            "probe_scenes": 300,  # pictures that the probes of layers are fitted on; 0: no probes
            "dtype": config_dict.placeholder(str),  # default: as stored
            "towers": (),  # "name in config.json=folder" for towers that are elsewhere
            "seed": 0,  # of the scenes, of the other origin's order, and of t-SNE
        }
    )
