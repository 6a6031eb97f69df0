"""COMM and Dense Connector at any depth, against NumPy in float64 and numbers worked by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vfjax import InputError
from vfjax.architectures import COMMConfig, MergeConfig, dense
from vfjax.vision.encoders import CLIPConfig, DINOv2Config

RNG = np.random.default_rng(7)
N, S, D, E, OUT = 2, 9, 8, 12, 5
"""Pictures, patch tokens, widths of both encoders and of the LLM."""


def built(config: COMMConfig) -> tuple[nnx.Module, dict[str, np.ndarray]]:
    """A connector whose every parameter moves the output, and its parameters in float64."""
    graph, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    params, flat = {}, []
    for path, param in nnx.to_flat_state(state):
        name = "/".join(map(str, path))
        params[name] = RNG.normal(1.0 if name.endswith("scale") else 0.0, 0.5, param.shape)
        flat.append((path, param.replace(jnp.asarray(params[name], jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(flat)), params


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def affine(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]


def layer_norm(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}/scale"] + p[f"{name}/bias"]


def merged(p: dict[str, np.ndarray], side: str, c: MergeConfig, states: list) -> np.ndarray:
    """Section 3.2 of the paper, and its figure 3's other merges."""
    states = [s[:, c.drop :] for s in states]
    if c.merge == "mean":
        total = sum(states) / len(states)
    else:
        shares = np.exp(p[f"{side}/logits"])
        shares /= shares.sum()
        total = np.zeros_like(states[0])
        for i, (share, x) in enumerate(zip(shares, states, strict=True)):
            at = f"{side}/layers/{i}"
            if c.merge == "lln_layerscale":
                x = affine(p, f"{at}/dense", layer_norm(p, f"{at}/norm", x))
            if c.merge == "conv_layerscale":
                x = affine(p, at, x)
            total = total + share * x
    for i in range(c.blocks):
        at = f"{side}/mlp/{i}"
        total = affine(p, f"{at}/fc2", gelu(affine(p, f"{at}/fc1", total)))
    return total


def states_of(c: MergeConfig) -> list[np.ndarray]:
    return [RNG.normal(size=(N, c.drop + S, c.width)) for _ in c.layers]


@pytest.mark.parametrize(
    ("merge", "blocks", "ratio", "join"),
    [
        ("lln_layerscale", 1, 4, "channels"),
        ("lln_layerscale", 2, 3, "tokens"),
        ("layerscale", 0, 4, "channels"),
        ("mean", 1, 2, "tokens"),
        ("conv_layerscale", 0, 4, "channels"),
    ],
)
def test_comm_equations(merge: str, blocks: int, ratio: int, join: str):
    encoder = MergeConfig(D, (1, 2, 3), 1, merge)
    width = D if join == "tokens" else E
    aux = MergeConfig(width, (3, 4), 5, merge, blocks, ratio)
    config = COMMConfig(encoder, OUT, aux, join)
    model, p = built(config)
    states = {"encoder": states_of(encoder), "aux": states_of(aux)}
    v1, v2 = (merged(p, k, c, states[k]) for k, c in (("encoder", encoder), ("aux", aux)))
    expected = np.concatenate([v1, v2], axis=2 if join == "channels" else 1)
    memory = nnx.jit(lambda m, s: m(s))(
        model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), states)
    )
    found = memory.stages
    close = {"atol": 3e-5, "rtol": 3e-5}
    np.testing.assert_allclose(found["vision_features"], v1, **close)
    np.testing.assert_allclose(found["aux_features"], v2, **close)
    np.testing.assert_allclose(found["connector_features"], expected, **close)
    projected = affine(p, "projector", expected)
    np.testing.assert_allclose(found["image_features"], projected, **close)
    np.testing.assert_allclose(memory.values, projected.reshape(-1, OUT), **close)
    assert config.tokens(S, S) == projected.shape[1] == S * (2 if join == "tokens" else 1)
    assert config.taps == {"encoder": (1, 2, 3), "aux": (3, 4)}


def test_comm_of_one_encoder():
    encoder = MergeConfig(D, (2, 4), 0)
    model, p = built(COMMConfig(encoder, OUT))
    states = states_of(encoder)
    found = model({"encoder": [jnp.asarray(s, jnp.float32) for s in states]}).stages
    expected = affine(p, "projector", merged(p, "encoder", encoder, states))
    np.testing.assert_allclose(found["image_features"], expected, atol=3e-5)
    assert "aux_features" not in found


def test_new_shares_are_equal():
    model = MergeConfig(D, (1, 2, 3, 4), 0, "layerscale").build(rngs=nnx.Rngs(0))
    states = [jnp.asarray(s, jnp.float32) for s in states_of(model.config)]
    found = model(states, jnp.float32)
    np.testing.assert_allclose(found, sum(states) / 4, atol=1e-6)


def test_comm_at_full_size():
    """CLIP-L/14 and DINOv2-L/14 at 336 pixels before a 7B LLM, by hand."""
    clip, dino = CLIPConfig(), DINOv2Config(input_size=336)
    encoder = MergeConfig(clip.width, tuple(range(1, 25)), clip.prefix)
    aux = MergeConfig(dino.width, tuple(range(19, 25)), dino.prefix, blocks=1)
    config = COMMConfig(encoder, 4096, aux)
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    lln = 2 * 1024 + 1024 * 1024 + 1024  # 1,051,648
    first = 24 * lln + 24
    second = 6 * lln + 6 + (1024 * 4096 + 4096) + (4096 * 1024 + 1024)
    last = 2048 * 4096 + 4096
    counted = {
        "encoder": 25_239_576,
        "aux": 14_703_622,
        "projector": 8_392_704,
    }
    assert counted == {"encoder": first, "aux": second, "projector": last}
    for part, expected in counted.items():
        state = nnx.state(getattr(model, part))
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(state)) == expected
    assert sum(counted.values()) == 48_335_902
    shape = jax.ShapeDtypeStruct((1, 577, 1024), jnp.bfloat16)
    found = nnx.eval_shape(lambda m, s: m(s), model, {"encoder": [shape] * 24, "aux": [shape] * 6})
    assert found.stages["connector_features"].shape == (1, 576, 2048)
    assert found.values.shape == (config.tokens(clip.tokens, dino.tokens), 4096) == (576, 4096)


def test_comm_refuses_what_does_not_fit():
    encoder, aux = MergeConfig(D, (1,)), MergeConfig(E, (1,))
    with pytest.raises(InputError, match="9 tokens of one encoder, 16 of the other"):
        COMMConfig(encoder, OUT, aux).tokens(9, 16)
    model, _ = built(COMMConfig(encoder, OUT, aux))
    with pytest.raises(InputError, match="token grids"):
        model({"encoder": [jnp.ones((1, 5, D))], "aux": [jnp.ones((1, 10, E))]})
    with pytest.raises(InputError, match="widths 8 and 12"):
        COMMConfig(encoder, OUT, aux, "tokens")
    with pytest.raises(InputError, match="merge: found 'max'"):
        MergeConfig(D, (1,), merge="max")
    with pytest.raises(InputError, match="layers"):
        MergeConfig(D, ())
    with pytest.raises(InputError, match="join: found 'rows'"):
        COMMConfig(encoder, OUT, aux, "rows")


CLIP_L = {
    "sti": ((-2,), (7,), (15,)),
    "sci": ((-2,), (7,), (15,)),
    "dci": ((-2,), tuple(range(12)), tuple(range(12, 24))),
}
SO400M = {
    "sti": ((26,), (7,), (15,)),
    "sci": ((26,), (7,), (15,)),
    "dci": ((26,), tuple(range(13)), tuple(range(13, 26))),
}
TWELVE = {
    "sti": ((-2,), (3,), (7,)),
    "sci": ((-2,), (3,), (7,)),
    "dci": ((-2,), (0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11)),
}
FOUR = {
    "sti": ((-2,), (0,), (1,)),
    "sci": ((-2,), (0,), (1,)),
    "dci": ((-2,), (0, 1), (2, 3)),
}


@pytest.mark.parametrize("kind", ["sti", "sci", "dci"])
@pytest.mark.parametrize(
    ("layers", "groups"), [(24, CLIP_L), (26, SO400M), (12, TWELVE), (4, FOUR)]
)
def test_dense_groups(kind: str, layers: int, groups: dict):
    """Those of the published code at 24 and 26 layers; thirds and halves at other depths."""
    plain = groups[kind][0][0]
    combine = dense(kind, layers, plain, drop=1)
    assert combine.groups == groups[kind]
    states = {tap: RNG.normal(size=(N, 1 + 16, D)) for tap in combine.taps}
    first, *others = (
        np.mean([states[tap][:, 1:] for tap in group], axis=0) for group in groups[kind]
    )
    if kind == "sti":
        others = [x.reshape(N, 2, 8, D).mean(axis=2) for x in others]
    expected = np.concatenate([first, *others], axis=1 if kind == "sti" else 2)
    found = combine([jnp.asarray(states[tap], jnp.float32) for tap in combine.taps])[1]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (combine.tokens(16), combine.width(D)) == expected.shape[1:]


def test_dense_of_odd_depth_leaves_no_layer_out():
    assert dense("dci", 11, -2).groups == ((-2,), (0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))


def test_dense_refuses_what_it_cannot_read():
    with pytest.raises(InputError, match="found 'dcx', expected sti, sci, dci"):
        dense("dcx", 24, -2)
    with pytest.raises(InputError, match="'sci': layers: found 2, expected 3 or more"):
        dense("sci", 2, -2)
    with pytest.raises(InputError, match="'dci': layers: found 1, expected 2 or more"):
        dense("dci", 1, -2)
    with pytest.raises(InputError, match="'sti': side: found 12"):
        dense("sti", 24, -2, side=12)
