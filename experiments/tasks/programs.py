"""The programs of a job, compiled from shapes alone, and what each needs."""

import dataclasses
import functools
import math
import re
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped
from ml_collections import ConfigDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from converters.load import abstract, join
from experiments.tasks.chips import COLLECTIVES, stand_ins
from experiments.tasks.floor import moved, operations
from vfjax import Batch, InputError, Model, Processor
from vfjax.architectures import Pictures
from vfjax.model import ModelConfig
from vfjax.nn.flash import kernel_flops
from vfjax.sharding import by_token, param_sharding, rows_over
from vfjax.train import Group, LoRAConfig, Optim, State, add_lora, make_step, split
from vfjax.train.optim import name_of, named
from vfjax.train.step import cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Shape = jax.ShapeDtypeStruct


def model_of(config: ConfigDict, made: ModelConfig, mesh: Mesh, *, lora: bool = False) -> Model:
    """The model as shapes that lie on the mesh."""

    def build(*, rngs: nnx.Rngs) -> Model:
        model = made.build(rngs=rngs)
        return add_lora(model, LoRAConfig(rank=config.rank)) if lora else model

    graph, params = abstract(build)
    for name, p in params.items():
        dtype = config.dtype if jnp.issubdtype(p.dtype, jnp.floating) else p.dtype
        at = param_sharding(name, p, mesh)
        params[name] = p.replace(Shape(p.shape, dtype, sharding=at))
    return join(graph, params)


def one_token() -> "PreTrainedTokenizerFast":
    """A tokenizer to which every text is one token, as the marks around pictures are."""
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


def batch_of(config: ConfigDict, made: ModelConfig, mesh: Mesh, batch: int) -> Batch:
    """Inputs of the job as shapes: rows of one picture and of text, over the mesh's row axes."""
    labels = config.job == "train"
    processor = Processor(made, one_token(), lengths=tuple(range(128, 65536, 128)))
    if not made.branches:
        raise InputError(
            "config.model",
            found="an LLM without visual branches",
            expected="a model that reads pictures",
            fix="choose another",
        )
    ids = [[1, -200, *[0] * config.text]]
    picture = np.zeros((800, 1000, 3), np.uint8)
    row = processor([picture], input_ids=ids, labels=ids if labels else None)

    def grown(x: np.ndarray) -> Shape:
        shape = (batch * x.shape[0], *x.shape[1:])
        over = rows_over(mesh, shape[0])
        spec, lead = ((None, over), (1,)) if labels else ((over,), ())
        return Shape((*lead, *shape), x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(grown, row)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        compiled: it.
        given: shapes of what it is given besides the model.
        kernels: operations a device of what the compiler does not look into.
        least: operations a device, and bytes, of a perfect program (`experiments.tasks.floor`).
        narrow: bytes of the program that is meant, for each of the compiled one.
    """

    compiled: Any  # jax.stages.Compiled: what it tells of itself depends on the platform
    given: object
    kernels: float
    least: tuple[float, float]
    narrow: float = 1.0

    @classmethod
    def of(cls, function: Wrapped, given: object, mesh: Mesh, *args: object) -> Self:
        """A jitted function, for arguments of these shapes on a mesh.

        For GPUs it is compiled in float32, and its bytes are halved: XLA's CPU compiler would keep
        float32 copies of bfloat16 parameters, as it multiplies nothing narrower.
        """
        if stand_ins(mesh) and any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(args)):
            wide = cls.of(function, given, mesh, *cast(args, "float32"))
            return dataclasses.replace(wide, narrow=0.5)
        traced = function.trace(*args)
        compiled, kernels = traced.lower().compile(), kernel_flops(traced.jaxpr)
        lie = [x.sharding for x in jax.tree.leaves(args)]
        made = jax.tree.leaves(compiled.output_shardings)
        flops = operations(traced.jaxpr, mesh.size) + kernels
        return cls(compiled, given, kernels, (flops, moved(traced.jaxpr, lie, made)))

    @functools.cached_property
    def text(self) -> str:
        """Of the compiled program; empty where this jaxlib cannot read that compiler's."""
        try:
            return self.compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            print(f"collectives are not counted: {str(error).splitlines()[0][:120]}")
            return ""


Programs = dict[str, Program]


def plan_encode(model: Model, mesh: Mesh, batch: Batch) -> Programs:
    """Pictures to visual tokens."""
    return {"encode": Program.of(jax.jit(Model.memories), batch, mesh, model, batch.images)}


def plan_generate(config: ConfigDict, model: Model, mesh: Mesh, batch: Batch) -> Programs:
    """Prefill of encoded pictures, and one step of decoding."""
    names = [branch.name for branch in model.config.branches]
    memories = jax.eval_shape(Model.memories, model, batch.images)

    def laid(x: Shape) -> Shape:
        over = PartitionSpec(rows_over(mesh, x.shape[0]))
        return Shape(x.shape, x.dtype, sharding=NamedSharding(mesh, over))

    images: Any = {
        name: Pictures(jax.tree.map(laid, memory))
        for name, memory in zip(names, memories, strict=True)
    }
    batch = dataclasses.replace(batch, images=images)
    size = batch.read + config.new_tokens
    read = jax.jit(lambda model, batch: model.prefill(batch, size))
    prefill = Program.of(read, batch, mesh, model, batch)
    _, cache = jax.eval_shape(read, model, batch)
    _, at = prefill.compiled.output_shardings
    cache = jax.tree.map(lambda x, s: Shape(x.shape, x.dtype, sharding=s), cache, at)
    tokens = Shape(batch.tokens.shape[:1], jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    decode = jax.jit(lambda model, tokens, cache: model.next(tokens, cache), donate_argnums=2)
    return {
        "prefill": prefill,
        "token": Program.of(decode, (tokens, cache), mesh, model, tokens, cache),
    }


def plan_train(config: ConfigDict, model: Model, mesh: Mesh, batch: Batch) -> Programs:
    """One step."""
    model.llm.remat = config.remat
    model.llm.stream = by_token(mesh) if config.sequence else None
    groups = [Group(pattern, rate) for pattern, rate in config.train[config.trains]]
    graph, params, frozen = split(model, groups)
    tx = Optim(1000).build(groups)
    at = {name: x.sharding for name, x in named(params).items()}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def laid(path: jax.tree_util.KeyPath, x: Shape) -> Shape:
        found = [sharding for name, sharding in at.items() if name_of(path).endswith(name)]
        return Shape(x.shape, x.dtype, sharding=found[0] if found else everywhere)

    opt = jax.tree_util.tree_map_with_path(laid, jax.eval_shape(tx.init, params))
    count: Any = Shape((), jnp.int32, sharding=everywhere)
    state = State(count, params, opt)
    dtype = "float32" if stand_ins(mesh) else config.dtype
    step: Any = make_step(graph, tx, state, dtype=dtype, mesh=mesh)
    return {"step": Program.of(step, (opt, batch), mesh, state, frozen, batch)}


JOBS = {"generate": plan_generate, "evaluate": plan_generate, "train": plan_train}

ITEM = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def measured(program: Program, held: int) -> dict[str, float]:
    """Bytes a device, operations and memory traffic a device, collectives by kind.

    Args:
        program: it.
        held: bytes a device of the model, all of which stays there, also what the program ignores.
    """
    compiled, arguments = program.compiled, held + resident(program.given)
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    cost = compiled.cost_analysis()
    # libtpu 0.0.42.1 counts each of them five times (findings/libtpu_prefetch_bytes.sh).
    again = 4 * prefetched(program.text)
    out = {
        "bytes": arguments + program.narrow * made,
        "arguments": arguments,
        "flops": cost.get("flops", 0.0) + program.kernels,
        "traffic": program.narrow * (cost.get("bytes accessed", 0.0) - again),
        "counted again": again,
        "compiler seconds": cost.get("optimal_seconds", 0.0),
        "least flops": program.least[0],
        "least traffic": program.narrow * program.least[1],
    }
    for kind in COLLECTIVES:
        sizes = collectives(program.text, kind)
        out |= {kind: len(sizes), f"{kind} bytes": program.narrow * sum(sizes)}
    return out


def prefetched(text: str) -> int:
    """Bytes that a compiled program copies from HBM to VMEM before they are read."""
    starts = re.findall(r"= \((\w+)\[([\d,]*)\]\{[^}]*S\(1\)[^}]*\}, .*? copy-start\(", text)
    return sum(ITEM.get(t, 4) * math.prod(map(int, filter(None, n.split(",")))) for t, n in starts)


def collectives(text: str, kind: str) -> list[int]:
    """Bytes of the results of a kind of collective in a compiled program's text."""
    sizes = []
    for line in re.findall(rf"= (.*?) {kind}(?:-start)?\(", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", line)
        each = [ITEM.get(t, 4) * math.prod(map(int, n.split(","))) if n else 4 for t, n in arrays]
        sizes.append(max(each, default=0))  # a start's tuple holds what it reads, too
    return sizes


def resident(tree: object) -> int:
    """Bytes of a tree on a device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
