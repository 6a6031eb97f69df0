"""What a model needs on machines that are not here, by shapes alone."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from converters.registry import find
from experiments.configs.plan import get_config
from experiments.tasks import chips, plan, programs
from experiments.tasks.common import FAMILY
from experiments.tasks.shapes import model_config
from tests.converters.test_published_ports import PORTS
from vfjax import InputError
from vfjax.sharding import nbytes


def small(job: str, /, **changes):
    """The shipped family's member on eight GPUs, which CPU devices stand for."""
    jax.devices()  # the suite's eight, before a plan asks for as many as it wants
    config = get_config(job)
    config.update({"model": str(FAMILY / "clip"), "topology": "h100:8", "dtype": "float32"})
    config.update({"model_axis": 2, "batch": 8, "text": 8, "depths": (1, 2), **changes})
    return config


def planned(tmp_path: Path, config) -> dict:
    plan.run(config, tmp_path)
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize("job", ["generate", "evaluate"])
def test_generation(tmp_path, capsys, job):
    record = planned(tmp_path, small(job))
    programs = record["programs"]
    assert list(programs) == ["encode", "prefill", "token"]
    assert record["fits"] and "fits" in capsys.readouterr().out
    assert (tmp_path / "plan.png").stat().st_size > 1000
    for program in programs.values():
        assert program["share"] == program["floor"] / program["bound"] > 0
        assert program["least flops"] <= 1.01 * program["flops"]
    layers = model_config(str(FAMILY / "clip")).llm.layers
    # An attention's and a feed-forward's sum each layer over the devices that share a product.
    assert programs["prefill"]["all-reduce"] >= 2 * layers
    slowest = programs["encode"]["bound"] + programs["prefill"]["bound"]
    slowest += (record["new_tokens"] - 1) * programs["token"]["bound"]
    assert record["answers a second, at most"] == pytest.approx(8 / slowest)


def test_bytes_are_those_of_the_model():
    """Half of each divided parameter, all of the others; depth by the line through two."""
    config = small("generate", depths=())
    mesh, _ = chips.make_mesh(config.topology, 1, 1)
    whole = model_config(config.model)
    model = programs.model_of(config, whole, mesh)
    assert programs.resident(model) == nbytes(model)
    mesh, _ = chips.make_mesh(config.topology, 2, 1)
    shared = programs.resident(programs.model_of(config, whole, mesh))
    assert nbytes(model) / 2 <= shared < 0.6 * nbytes(model)


def test_the_line_through_two_depths_is_the_whole(tmp_path):
    layers = model_config(str(FAMILY / "clip")).llm.layers
    assert layers > 2
    line = planned(tmp_path / "line", small("generate"))["programs"]["token"]
    whole = planned(tmp_path / "whole", small("generate", depths=()))["programs"]["token"]
    for key in ("arguments", "flops", "all-reduce"):
        assert line[key] == pytest.approx(whole[key], rel=0.02)


def test_bfloat16_on_gpus_keeps_no_float32_copies():
    """The result and one product between, at two bytes a number, and nothing of the weights."""
    mesh, _ = chips.make_mesh(small("generate").topology, 1, 1)
    at = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct((256, 256), "bfloat16", sharding=at)] * 2
    program = programs.Program.of(jax.jit(lambda x, w: jnp.tanh(x @ w) @ w), args, mesh, *args)
    found, one = programs.measured(program, 0), 2 * 256 * 256
    assert found["arguments"] == 2 * one
    assert one <= found["bytes"] - found["arguments"] < 2.2 * one
    assert found["flops"] == pytest.approx(2 * 2 * 256**3, rel=0.02)


def test_training(tmp_path):
    record = planned(tmp_path, small("train", trains="full", fsdp=2))
    step = record["programs"]["step"]
    mesh, _ = chips.make_mesh("h100:8", 2, 2)
    model = programs.model_of(small("train"), model_config(str(FAMILY / "clip")), mesh)
    assert step["arguments"] > 2 * programs.resident(model)  # Adam's two moments of what is trained
    assert step["all-gather"] >= 1


def test_what_does_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, "h100", chips.Chip(0.0001, 1e12, 1e12, 1e12))
    record = planned(tmp_path, small("generate", largest=True, explain=True))
    assert not record["fits"]
    assert record["largest batch"] == 0
    assert "does NOT fit" in (out := capsys.readouterr().out)
    assert "compiles the LLM's of 2 layers, 3 of 3" in out
    assert out.count("gives no cycles of lines") == 3  # for CPUs, which stand for these GPUs
    assert "--config.model_axis=" in out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"topology": "h100:9"}, "8 CPU devices"),
        ({"topology": "z80:8"}, "z80"),
        ({"model_axis": 3}, "model_axis"),
        ({"model": "clip@gpt"}, "branch\\+branch@llm"),
        ({"job": "sing"}, "generate or evaluate or train"),
        ({"depths": (1,)}, "depths"),
        ({"mask": "none"}, "'causal' or 'block'"),
    ],
)
def test_refused(tmp_path, change, named):
    with pytest.raises(InputError, match=named):
        plan.run(small("generate", **change), tmp_path)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("qwen2.5-vl+internvl@qwen2.5-7b", ("Qwen2.5-VL-7B-Instruct", "InternVL3-8B-hf")),
        ("qwen3-vl+internvl@qwen3-8b", ("Qwen3-VL-8B-Instruct", "InternVL3_5-8B-HF")),
    ],
)
def test_pairs_of_their_true_size(model: str, names: tuple[str, str]):
    """Sizes are the published ones; a batch of one picture a row is made of shapes."""
    config = get_config("generate")
    config.update({"batch": 8, "model_axis": 4, "topology": "h100:8"})
    jax.devices()
    mesh, _ = chips.make_mesh("h100:8", 4, 1)
    made = model_config(model)
    for branch, name in zip(made.branches, names, strict=True):
        vision = transformers.AutoConfig.for_model(**PORTS[name]).vision_config.to_dict()
        (encoder,) = branch.architecture.encoders.values()
        expected = find(vision, name).config(vision)
        same = ("width", "layers", "heads", "mlp", "patch", "act")
        assert all(getattr(encoder, x) == getattr(expected, x) for x in same), name
        assert branch.architecture.connector.dout == made.llm.width
    placed = transformers.AutoConfig.for_model(**PORTS[names[0]]).get_text_config().to_dict()
    expected = find(placed, names[0]).config(placed)
    theta = (
        expected.rope_theta if "Qwen2" in names[0] else 1e6
    )  # Qwen3-VL's is five times the base's
    found = dataclasses.replace(made.llm, context=expected.context, rope_theta=expected.rope_theta)
    assert found == expected and made.llm.rope_theta == theta
    batch = programs.batch_of(config, made, mesh, 8)
    assert batch.place.shape == (*batch.tokens.shape, 3) and len(batch.tokens) == 8
    model_ = programs.model_of(config, made, mesh)
    states = jax.eval_shape(lambda m, images: m.memories(images), model_, batch.images)
    assert {memory.values.shape[1] for memory in states} == {made.llm.width}
    assert any(memory.deep is not None for memory in states) == ("qwen3" in model)


def test_gpus_from_the_command_line():
    """Nothing asks JAX for its devices before the topology is known: the next argument is wrong."""
    run = [sys.executable, "experiments/run.py", "--config=experiments/configs/plan.py"]
    asked = ["--config.topology=h100:4", "--config.model_axis=4", "--config.model=llava@none"]
    env = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [*run, *asked], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode and "config.model: found 'none'" in done.stdout + done.stderr


def test_prefetches_are_counted() -> None:
    """What libtpu's text says of a copy to VMEM, and of one within HBM."""
    layout = "{1,0:T(8,128)(2,1)S(1)}"
    plain = layout.replace("S(1)", "")
    text = (
        f"  %a = (bf16[8,128]{layout}, bf16[8,128]{plain}, u32[]{{:S(2)}}) copy-start(%p)\n"
        f"  %b = (bf16[8,128]{plain}, bf16[8,128]{plain}, u32[]{{:S(2)}}) copy-start(%q)\n"
        f"  %c = bf16[8,128]{layout} copy-done(%a)\n"
    )
    assert programs.prefetched(text) == 2 * 8 * 128
