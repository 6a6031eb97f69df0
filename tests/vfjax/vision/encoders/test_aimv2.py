"""Ovis2's tower against transformers."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import Ovis2VisionConfig
from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionTransformer

from converters.params.aimv2 import TABLE
from tests.checkpoints import randomize
from tests.vfjax.vision.encoders.common import assert_close, channels_first, pixels, run


@torch.no_grad()
def test_every_tap():
    config = Ovis2VisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        rms_norm_eps=1e-2,
        qkv_bias=True,
        mlp_bias=True,
        hidden_act="gelu",
    )
    theirs = randomize(Ovis2VisionTransformer(config), 3)
    ours = TABLE.config(config.to_dict()).build(rngs=nnx.Rngs(0))
    params = {"/".join(map(str, path)): p for path, p in nnx.to_flat_state(nnx.state(ours))}
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    for path, rule in TABLE.check({k: p.shape for k, p in params.items()}, tensors, "").items():
        value = tensors[rule.source]
        params[path][...] = jnp.asarray(value if rule.perm is None else value.transpose(rule.perm))
    x, states = pixels(2, 28, 28), []
    for layer in theirs.encoder.layers:
        layer.register_forward_pre_hook(lambda _, given: states.append(given[0].numpy()))
    last = theirs(channels_first(x)).last_hidden_state.numpy()
    found = run(ours, x, (0, 1, 2))
    for k, expected in enumerate(states):
        assert_close(found[k], expected, k)
    assert_close(ours.norm(found[2]), last, "norm")
    np.testing.assert_array_equal(ours(x, (-1,), norm=True)[0].shape, last.shape)
