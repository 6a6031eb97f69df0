"""SigLIP under timm's names computes what transformers' own does, of the same weights."""

import dataclasses

import torch

from converters.hf import encoders
from vfjax.vision.encoders import SigLIPConfig

NAMES = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
    "post_layernorm": "norm",
}
"""Parts of names in transformers -> timm's."""


@torch.no_grad()
def test_names_of_timm() -> None:
    sizes = {"width": 8, "layers": 2, "heads": 2, "mlp": 12, "patch": 7, "image_size": 21}
    config = SigLIPConfig(**sizes)
    theirs = encoders.build(config)
    timms = dataclasses.replace(config, batch_axis=True)
    ours, state = encoders.build(timms), {}
    for name, value in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        state[name] = value.copy_(torch.randn_like(value))
    state["pos_embed"] = state.pop("embeddings.position_embedding.weight")[None]
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    ours.load_state_dict(state)
    pixels, taps = torch.randn(2, 21, 21, 3), (-1, 0, 1)
    found = encoders.tapped(timms, ours, pixels, taps)
    expected = encoders.tapped(config, theirs, pixels, taps)
    torch.testing.assert_close(found, expected)
    norms = [encoders.final_norm(x)(found[0]) for x in (ours, theirs)]
    torch.testing.assert_close(*norms)
