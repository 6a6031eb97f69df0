"""COMM's branch in torch."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import converters
from converters.formats.comm import TABLE
from converters.hf.comm import COMM
from tests.checkpoints import llama_folder, tower_folder
from tests.converters.hf.recorded import assert_connectors_learn
from tests.torch_fused import assert_same, open_in_torch, picture
from vfjax.architectures import COMMConfig, MergeConfig


@torch.no_grad()
@pytest.mark.parametrize(
    ("merge", "blocks", "join"),
    [
        ("lln_layerscale", 2, "channels"),
        ("conv_layerscale", 1, "tokens"),
        ("layerscale", 0, "channels"),
        ("mean", 1, "tokens"),
    ],
)
def test_every_merge_equals_vfjax(merge: Any, blocks: int, join: Any) -> None:
    rng = np.random.default_rng(0)
    second = MergeConfig(8, (1, 3, 2), 5, merge, blocks, 3)
    config = COMMConfig(MergeConfig(8, (2, 1), 1, merge), 12, second, join)
    ours = config.build(rngs=nnx.Rngs(0))
    drawn = {}
    for path, param in nnx.to_flat_state(nnx.state(ours)):
        param[...] = jnp.asarray(rng.normal(0, 0.3, param.shape), jnp.float32)
        drawn["/".join(map(str, path))] = np.asarray(param[...])
    rules = TABLE.match({path: x.shape for path, x in drawn.items()})
    theirs = COMM(config)
    theirs.load_state_dict(
        {rule.source: torch.tensor(rule.to_source(drawn[path])) for path, rule in rules.items()}
    )
    shapes = {"encoder": [(2, 1 + 9, 8)] * 2, "aux": [(2, 5 + 9, 8)] * 3}
    states = {k: [rng.normal(size=s).astype(np.float32) for s in v] for k, v in shapes.items()}
    expected = ours({k: list(map(jnp.asarray, v)) for k, v in states.items()}).values
    found = theirs({k: list(map(torch.tensor, v)) for k, v in states.items()})
    np.testing.assert_allclose(found.flatten(0, 1), expected, rtol=0, atol=1e-5)


def test_a_fused_folder_equals_vfjax(tmp_path: Path) -> None:
    """CLIP with DINOv2."""
    llama_folder(tmp_path / "llm", 1, num_hidden_layers=1)
    tower_folder(tmp_path / "clip", "clip", 2, num_hidden_layers=2)
    tower_folder(tmp_path / "dino", "dinov2", 3, num_hidden_layers=2)
    parts = [tmp_path / name for name in ("llm", "clip", "dino")]
    how = {"kind": "comm", "layers_aux": [1, 2]}
    model, _ = converters.create(*parts[:2], how, aux=parts[2])
    converters.export(model, tmp_path / "member")
    fused = tmp_path / "fused"
    converters.fuse({"comm": tmp_path / "member"}, fused, method="passthrough", family=False)
    pictures = [picture(40, 30), picture(25, 50, 1), picture(30, 30, 2)]
    rows = [[1, 40, -200, 60, -200, 62, 63], [1, -200, 70], [1, 7]]
    loaded, made = converters.load(fused), open_in_torch(fused)
    assert_same(loaded, made, pictures, rows, sides=("left",), new=0)
    assert_connectors_learn(made, loaded[1](pictures[:1], input_ids=[[1, -200, 7]]))
