"""The whole path on a mesh of eight devices against one device."""

import collections
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import converters
from converters.files.reader import FileTensor
from converters.load import flatten
from tests.checkpoints import (
    fused_folder,
    make_connector,
    make_llama,
    make_tower,
    upstream_llava_folder,
)
from vfjax import (
    Batch,
    InputError,
    Model,
    Processor,
    Sampling,
    Settings,
    forward,
    generate_ids,
)
from vfjax.generate import decode, first_tokens, prefill, rows_of
from vfjax.nn.layers import linear
from vfjax.sharding import make_mesh, mesh_of, param_sharding, place

SMALL = {"num_hidden_layers": 2}
LIMIT = 1e-5
"""Largest difference of logits, as a share of the largest logit."""

IMAGE = -200
ROWS = ([1, 40, IMAGE, 50], [1, IMAGE, 60, 61, 62, 63], [1, 70, 71, IMAGE], [1, 80, 81, 82, IMAGE])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A LLaVA of two key heads, and a fusion of two branches with four."""
    root = tmp_path_factory.mktemp("mesh")
    llm = make_llama(0, **SMALL)
    upstream_llava_folder(root / "llava", llm=llm, weights="safetensors", vision=SMALL)
    llm, branches = make_llama(1, **SMALL, num_key_value_heads=4), {}
    for seed, kind in enumerate(("clip", "siglip")):
        tower = make_tower(kind, seed, **SMALL)
        connector = make_connector((tower.config.hidden_size, 32, 32), seed)
        branches[kind] = (
            tower,
            connector,
            {
                "taps": [-2],
                "drop": int(kind == "clip"),
                "aspect": "pad",
            },
        )
    fused_folder(root / "fused", llm, branches)
    return {name: root / name for name in ("llava", "fused")}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(2, 4)


@pytest.fixture(scope="module")
def single(folders) -> dict[str, tuple[Model, Processor]]:
    return {name: converters.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def sharded(folders, mesh) -> dict[str, Model]:
    return {name: converters.load(folder, mesh=mesh)[0] for name, folder in folders.items()}


def make_batch(processor: Processor, rows: int) -> Batch:
    rng = np.random.default_rng(rows)
    pictures = list(rng.integers(0, 256, (rows, 40, 50, 3), np.uint8))
    return processor(pictures, input_ids=ROWS[:rows])


@pytest.mark.parametrize(("name", "rows"), [("llava", 3), ("fused", 4)])
def test_logits_equal_those_of_one_device(single, sharded, mesh, name, rows) -> None:
    """`data` divides four rows, but not three; `model` the fused model's key heads only."""
    model, processor = single[name]
    batch = make_batch(processor, rows)
    expected = np.asarray(forward(model, place(batch, None)))[batch.mask]
    found = np.asarray(forward(sharded[name], place(batch, mesh)))[batch.mask]
    assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()


def test_tokens_equal_those_of_one_device(single, sharded) -> None:
    model, processor = single["fused"]
    batch = make_batch(processor, 4)
    tokens = [generate_ids(m, batch, max_new_tokens=8) for m in (model, sharded["fused"])]
    assert tokens[0] == tokens[1]
    assert [len(row) for row in tokens[0]] == [8] * 4


@pytest.mark.parametrize("axes", [(1, 8), (2, 2, 2), (1, 1, 8)], ids=str)
def test_other_strategies_write_the_same_tokens(folders, single, axes) -> None:
    """More devices than key heads, three rows on two, shared parameters (fsdp)."""
    model, processor = single["fused"]
    batch = make_batch(processor, 3)
    other, _ = converters.load(folders["fused"], mesh=make_mesh(*axes))
    kernel = other.llm.blocks[0].mlp.up.kernel.get_value()
    divided = (axes[2] if len(axes) > 2 else 1, axes[1])
    own = tuple(n // d for n, d in zip(kernel.shape, divided, strict=True))
    assert kernel.addressable_shards[0].data.shape == own
    expected = generate_ids(model, batch, max_new_tokens=8)
    assert generate_ids(other, batch, max_new_tokens=8) == expected


def shapes(kind: str, text: str) -> set[tuple[int, ...]]:
    """Shapes of the results of an operation in a compiled program."""
    found = re.findall(rf"= \w+\[([\d,]+)\]\S* {kind}\(", text)
    return {tuple(map(int, shape.split(","))) for shape in found}


@pytest.mark.parametrize("devices", [1, 8])
def test_decoding_gathers_no_parameter_and_copies_no_cache(folders, single, devices) -> None:
    """By the compiled program's own text: parameters with tensor parallelism, the cache without."""
    mesh = make_mesh(1, 8) if devices == 8 else None
    model, _ = converters.load(folders["fused"], mesh=mesh)
    batch = place(make_batch(single["fused"][1], 4), mesh)
    logits, cache = prefill(*jax.tree.flatten(model), batch, size=batch.tokens.shape[1] + 64)
    rows = rows_of(model, batch, 8, (), Sampling(), Settings())
    args = (
        *jax.tree.flatten(model),
        cache,
        first_tokens(logits, rows, steps=64),
        rows,
        jnp.int32(8),
    )
    text = decode.lower(*args).compile().as_text()
    assert "dynamic-update-slice" in text  # the cache is written, and the shapes below are its own
    if mesh is None:
        assert not {cache.k[0].shape, cache.v[0].shape} & shapes("copy", text)
        return
    assert shapes("all-reduce", text)
    matrices = {p.shape for p in flatten(nnx.split(model)[1]).values() if len(p.shape) > 1}
    assert not matrices & shapes("all-gather", text)


def test_every_parameter_is_divided_as_its_axes_say(sharded, mesh) -> None:
    for model in sharded.values():
        params = flatten(nnx.split(model)[1])
        for name, param in params.items():
            divided = [4 if axis in ("heads", "mlp", "vocab") else 1 for axis in param.axes]
            expected = tuple(n // d for n, d in zip(param.shape, divided, strict=True))
            shards = param.get_value().addressable_shards
            assert len(shards) == 8, name
            assert {shard.data.shape for shard in shards} == {expected}, name
        for name, axis in {
            "llm/embedding": 0,
            "llm/head/kernel": 1,
            "llm/blocks/1/attn/k/kernel": 1,
            "llm/blocks/1/attn/out/kernel": 0,
            "llm/blocks/1/mlp/down/kernel": 0,
            "branches/clip/encoder/blocks/1/attn/q/bias": 0,
            "branches/clip/encoder/blocks/1/mlp/fc1/kernel": 1,
        }.items():
            value = params[name].get_value()
            assert value.addressable_shards[0].data.shape[axis] == value.shape[axis] // 4, name


def test_a_batch_is_divided_over_data_where_it_divides(single, mesh) -> None:
    batch = make_batch(single["fused"][1], 4)
    placed = place(batch, mesh)
    host, leaves = jax.tree.leaves(batch), jax.tree.leaves(placed)
    for array, leaf in zip(host, leaves, strict=True):
        assert {s.data.shape for s in leaf.addressable_shards} == {(2, *array.shape[1:])}
        assert np.array_equal(array, np.asarray(leaf))
    odd = place({"three": np.arange(3), "scalar": np.float32(1)}, mesh)
    assert {s.data.shape for s in odd["three"].addressable_shards} == {(3,)}
    assert odd["scalar"].sharding.spec == PartitionSpec()


def test_the_cache_is_divided_over_rows_and_key_heads(single, sharded, mesh) -> None:
    """After the prefill, and after the decode loop, whose buffers it is."""
    model = sharded["fused"]
    batch = place(make_batch(single["fused"][1], 4), mesh)
    size = batch.tokens.shape[1] + 64
    logits, cache = prefill(*jax.tree.flatten(model), batch, size=size)

    def shapes(cache: object) -> list[set[tuple[int, ...]]]:
        return [
            {s.data.shape for x in xs for s in x.addressable_shards} for xs in (cache.k, cache.v)
        ]

    divided = [{(2, 1, 8, size)}, {(2, 1, size, 8)}]
    assert shapes(cache) == divided
    rows = rows_of(model, batch, 8, (), Sampling(), Settings())
    args = (
        *jax.tree.flatten(model),
        cache,
        first_tokens(logits, rows, steps=64),
        rows,
        jnp.int32(8),
    )
    program = decode.lower(*args).compile()
    assert f"[2,4,{size},8]" not in program.as_text()  # no device ever holds all heads
    _, cache = decode(*args)
    assert shapes(cache) == divided


def test_each_row_of_a_tensor_is_read_once(folders, mesh, monkeypatch) -> None:
    rows, sizes = collections.defaultdict(list), {}
    read = FileTensor.__getitem__

    def count(self: FileTensor, index: slice) -> np.ndarray:
        sizes[self.path, self.offset] = self.shape[0]
        rows[self.path, self.offset] += range(*index.indices(self.shape[0]))
        return read(self, index)

    monkeypatch.setattr(FileTensor, "__getitem__", count)
    model, _ = converters.load(folders["fused"], mesh=mesh)
    assert len(rows) == len(flatten(nnx.split(model)[1]))
    assert {key: sorted(found) for key, found in rows.items()} == {
        key: list(range(size)) for key, size in sizes.items()
    }


def test_dtype_is_cast_on_the_mesh(folders, mesh) -> None:
    model, _ = converters.load(folders["llava"], mesh=mesh, dtype="bfloat16")
    kernel = model.llm.head.kernel
    assert kernel.dtype == jnp.bfloat16
    assert kernel.get_value().addressable_shards[0].data.shape == (32, 80)


@pytest.mark.parametrize("name", ["llava", "fused"])
def test_export_from_a_mesh_writes_the_same_bytes(single, sharded, tmp_path, name) -> None:
    converters.export(single[name][0], tmp_path / "single")
    converters.export(sharded[name], tmp_path / "sharded")
    files = [
        {p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob("*.*")}
        for out in ("single", "sharded")
    ]
    assert Path("model.safetensors") in files[0]
    assert files[0] == files[1]


def test_an_axis_that_does_not_divide_names_the_parameter(tmp_path) -> None:
    llm = make_llama(0, **SMALL, intermediate_size=44)
    upstream_llava_folder(tmp_path, llm=llm, vision=SMALL)
    message = r"^llm/blocks/0/mlp/\w+/kernel: found axis 'mlp' of size 44, expected a multiple of 8"
    with pytest.raises(InputError, match=message):
        converters.load(tmp_path, mesh=make_mesh(1, 8))


@pytest.mark.parametrize(("tied", "shape"), [(False, (1, 2, 4)), (True, (1, 8))])
def test_an_odd_vocabulary_is_divided_by_features(tmp_path, tied: bool, shape) -> None:
    """Over all devices that share parameters."""
    llm = make_llama(0, **SMALL, vocab_size=323, tie_word_embeddings=tied)
    upstream_llava_folder(tmp_path, llm=llm, vision=SMALL)
    model, processor = converters.load(tmp_path)
    other, _ = converters.load(tmp_path, mesh=make_mesh(*shape))
    both = ("model", "fsdp")
    assert other.llm.embedding[...].sharding.spec == PartitionSpec(None, both)
    if not tied:
        assert other.llm.head.kernel[...].sharding.spec == PartitionSpec(both, None)
    batch = make_batch(processor, 2)
    expected = generate_ids(model, batch, max_new_tokens=6)
    assert generate_ids(other, batch, max_new_tokens=6) == expected


def test_a_mesh_needs_every_device() -> None:
    with pytest.raises(InputError, match=r"^mesh: found data=2 x model=3 x fsdp=1, expected 8"):
        make_mesh(2, 3)


def test_param_sharding_follows_the_rules_given(mesh) -> None:
    kernel = linear(8, 12, ("embed", "mlp"), rngs=nnx.Rngs(0)).kernel
    assert param_sharding("kernel", kernel, mesh).spec == PartitionSpec("fsdp", "model")
    other = (("^llm/", {"embed": "data", "mlp": None}), ("kernel$", {}))
    for name, spec in {"llm/kernel": ("data", None), "kernel": (None, None)}.items():
        assert param_sharding(name, kernel, mesh, other).spec == PartitionSpec(*spec)
    assert param_sharding("bias", kernel, mesh, other).spec == PartitionSpec("fsdp", "model")
    with pytest.raises(InputError, match=r"^shard 'k': found mesh axis 'tensor', expected data, "):
        param_sharding("kernel", kernel, mesh, (("k", {"mlp": "tensor"}),))


def test_mesh_of_a_tree(single, sharded, mesh) -> None:
    assert mesh_of(sharded["llava"]) == mesh
    assert mesh_of(single["llava"][0]) is None
    assert mesh_of(dataclasses.asdict(make_batch(single["llava"][1], 1))) is None


def test_two_axes_of_a_parameter_on_one_of_the_mesh(mesh) -> None:
    variable = nnx.Param(jax.numpy.zeros((8, 16)), axes=("embed", "mlp"))
    rules = [("up", {"embed": "model", "mlp": ("data", "model")})]
    with pytest.raises(InputError) as error:
        param_sharding("llm/blocks/0/mlp/up/kernel", variable, mesh, rules)
    assert str(error.value) == (
        "shard 'up': llm/blocks/0/mlp/up/kernel: found mesh axis 'model' for two of the axes "
        "embed, mlp, expected one of the parameter's axes for each of the mesh's; leave one out"
    )
