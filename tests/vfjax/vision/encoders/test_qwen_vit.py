"""Qwen-VL's towers against transformers', on pictures of several sizes in one sequence."""

import jax
import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from tests.qwen_vl import VISION, Port, assert_close, image_processor, open_port, picture
from vfjax import Model


@pytest.fixture(scope="module", params=VISION)
def port(request, tmp_path_factory) -> Port:
    return open_port(tmp_path_factory.mktemp(request.param) / "port", request.param)


@torch.no_grad()
def test_the_tower(port: Port):
    """Patches, hidden states of all layers, visual tokens; of three sizes in one sequence."""
    images = [picture(61, 47), picture(30, 500), picture(20, 20)]
    batch = port.processor([images], input_ids=[[-200, -200, -200]])
    ((name, seen),) = batch.images.items()
    inputs = image_processor()(images, return_tensors="pt")
    branch, visual = port.model.branches[name], port.theirs.model.visual
    order, count = np.arange(len(inputs.pixel_values)), len(inputs.pixel_values)
    if branch.config.encoder.window:
        windows, _ = get_vision_window_index(inputs.image_grid_thw, 2, 24, 4)
        order = (4 * windows[:, None] + torch.arange(4)).flatten().numpy()
    pixels = inputs.pixel_values.numpy()[order]
    np.testing.assert_allclose(seen.given.pixels[:count], pixels, atol=1e-6)
    states: list[np.ndarray] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: states.append(out.numpy()))
        for layer in visual.blocks
    ]
    tokens = visual(inputs.pixel_values, grid_thw=inputs.image_grid_thw).pooler_output.numpy()
    for hook in hooks:
        hook.remove()
    taps = jax.jit(lambda b, x: b.encoder(x.pixels, (1, 2, 3), **x.where))(branch, seen.given)
    for k, (found, expected) in enumerate(zip(taps, states, strict=True)):
        assert_close(np.asarray(found)[0, :count], expected, k)
    memory = np.asarray(jax.jit(Model.visual_tokens)(port.model, batch.images).values)
    assert_close(memory[batch.visual[batch.visual >= 0]], tokens)
