"""Tables: which checkpoint tensor is which parameter, and how it is laid out, both ways."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import ml_dtypes
import numpy as np
from flax import nnx

from converters.values import Unused, Values
from vfjax import InputError
from vfjax.architectures import Architecture
from vfjax.architectures.base import PatchEncoder
from vfjax.atomic import JSON
from vfjax.errors import counted
from vfjax.merge import LazyTensor
from vfjax.vision.images import ImageSpec

Arrays = Mapping[str, np.ndarray]

Config = TypeVar("Config")
"""Class of a component's config."""

TRANSPOSE = (1, 0)
"""torch Linear (out, in) -> kernel (in, out)."""

CONV = (2, 3, 1, 0)
"""torch Conv2d (out, in, h, w) -> kernel (h, w, in, out)."""

LM = "ForCausalLM"
"""How the names of causal LMs' classes end."""

FLOATS = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32)))
"""Dtypes that parameters have."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor, or one a layer where both names hold a `{}` for the layer's number.

    Attributes:
        source: name in the checkpoint.
        path: path of the parameter.
        perm: axes of the source in the parameter's order; None keeps them.
        part: (i, n) takes the i-th of n equal parts of the source's first axis; n rules share it.
        optional: a folder may have the tensor where the model has no such parameter.
        like: the tensor that takes its place in a model without the parameter (a tied head's
            embedding); see `converters.source.settle`.
        stack: the source holds one more `{}`: a tensor for each row of the parameter's first axis.
        row: which row this is the rule of; None for all (see `each`).
    """

    source: str
    path: str
    perm: tuple[int, ...] | None = None
    part: tuple[int, int] = (0, 1)
    optional: bool = False
    like: str = ""
    stack: bool = False
    row: int | None = None

    def each(self, shape: tuple[int, ...]) -> tuple["Rule", ...]:
        """One rule a tensor, for a parameter of `shape`: itself, or those of its rows."""
        if not self.stack or self.row is not None:
            return (self,)
        rows = range(shape[0])
        return tuple(replace(self, source=self.source.format(i), row=i) for i in rows)

    def to_source(self, array: np.ndarray) -> np.ndarray:
        """Parameter layout (of its row) -> checkpoint layout (of its part), as a view."""
        return array.transpose(np.argsort(self.perm)) if self.perm else array

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the checkpoint of a parameter of `shape`, or of its row."""
        shape = shape if self.row is None else shape[1:]
        own = tuple(shape[i] for i in np.argsort(self.perm)) if self.perm else shape
        return (own[0] * self.part[1], *own[1:]) if self.part[1] > 1 else own


@dataclasses.dataclass(frozen=True)
class Published:
    """The two JSON files of a published tower."""

    config: Mapping[str, JSON]
    preprocessor: Mapping[str, JSON]


class Layered(Protocol):
    """Config of an encoder or an LLM."""

    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    def __hash__(self) -> int: ...
    def build(self, *, rngs: nnx.Rngs) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True)
class Table(Generic[Config]):
    """One component: a vision encoder, a connector or an LLM.

    Attributes:
        types: the `model_type` values of the configs it is for.
        read: Hugging Face config -> the component's config.
        rules: every parameter's rule.
        unused: keys of that config that are known to have no effect on what is computed here.
        ignore: patterns (full match) of tensors that are known and that nothing reads; they go
            where the folder is exported to, as they are.
        split: for files that hold several of the tensors in one: (name in the file, tensor) ->
            those tensors under the names of `rules`; {} for other names.
        prefixes: how a stand-alone checkpoint names things: (prefix there, prefix in `rules`), the
            first that fits.
        around: such keys beside the `vision_config` of a larger model that a tower is part of.
        architecture: class that a causal LM's config.json names; empty for other components.
        plain: for LLMs with M-RoPE: `model_type` of the same one with one position a token.
        ids: for connectors: keys of their config that hold token ids, and whether a tokenizer must
            have those; it need not have what stands for a picture in the member's own.
        depth: for encoders that a checkpoint may hold without their last layers: the key that
            says how many there are; "": all must be there.
        others: for connectors: names of encoders that they may read beside the first.
        path: for connectors: (their Hugging Face config, preprocessing, encoder's config,
            connector's config) -> the branch's architecture.
        recorded: for connectors: (connector's config, the branch's inputs, its stages) -> the
            stages under the names of the authors' code, for `converters verify`; by default those
            that the connector gives them.
        limits: for connectors: stage -> limit of `converters verify` in place of the usual one.
        published: last part of a repository's name -> its config and preprocessor, for checkpoints
            that hold a tower and only name where its config is.
    """

    types: tuple[str, ...]
    read: Callable[[Values], Config]
    rules: tuple[Rule, ...]
    unused: Unused
    ignore: tuple[str, ...] = ()
    split: Callable[[str, LazyTensor], Mapping[str, LazyTensor]] = lambda name, tensor: {}
    prefixes: tuple[tuple[str, str], ...] = (("", ""),)
    around: Unused = dataclasses.field(default_factory=dict)
    architecture: str = ""
    plain: str = ""
    ids: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    depth: str = ""
    others: tuple[str, ...] = ()
    path: Callable[[Values, ImageSpec, PatchEncoder, Config], Architecture] | None = None
    # Any: a family's own `Inputs`
    recorded: Callable[[Config, Any, Arrays], Arrays] = lambda config, inputs, stages: stages
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    published: Mapping[str, "Published"] = dataclasses.field(default_factory=dict)

    def config(self, hf: Mapping[str, JSON], where: str = "config.json") -> Config:
        """The component's config; missing keys have the defaults of its transformers class.

        Args:
            hf: its Hugging Face config.
            where: what to call that in errors.

        Raises:
            InputError: a key of the wrong type, one that is missing, or one that asks for what is
                not supported.
        """
        values = Values(hf, where)
        made = self.read(values)
        if self.architecture:
            _check_class(values, self.architecture.removesuffix(LM))
        values.done(self.unused)
        return made

    def architecture_of(
        self, hf: Mapping[str, JSON], where: str, images: ImageSpec, encoder: PatchEncoder
    ) -> Architecture:
        """The architecture of a branch by its connector's config.

        Args:
            hf: the connector's Hugging Face config, and those of other encoders by their names.
            where: what to call that in errors.
            images: how pictures are prepared.
            encoder: config of the first encoder.
        """
        assert self.path is not None, f"the table of {where} is of no connector"
        values = Values(hf, where)
        made = self.path(values, images, encoder, self.read(values))
        values.done(self.unused)
        return made

    def match(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Rule]:
        """Parameter path -> its rule, with the layer's number filled in.

        Args:
            shapes: path -> shape of all of the component's parameters.
        """
        patterns = [
            (re.compile(re.escape(rule.path).replace(r"\{\}", r"(\d+)")), rule)
            for rule in self.rules
        ]
        return {path: _match_one(path, patterns) for path in shapes}

    def layers(self, names: Iterable[str]) -> int:
        """Of how many layers there are tensors.

        Args:
            names: of the component's tensors.
        """
        sources = (rule.source for rule in self.rules if "{}" in rule.source)
        patterns = [re.compile(re.escape(x).replace(r"\{\}", r"(\d+)")) for x in sources]
        return len({m[1] for name in names for p in patterns if (m := p.fullmatch(name))})

    def ignores(self, name: str) -> bool:
        """Whether a tensor is known and never read."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)

    def spares(self, name: str) -> bool:
        """Whether a tensor is known that a model may lack."""
        return any(r.optional and r.source == name for r in self.rules) or self.ignores(name)

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], where: str
    ) -> dict[str, Rule]:
        """`match`, after checking that parameters and tensors fit one to one.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not of a dtype in FLOATS.
        """
        rules = self.match(shapes)
        every = [(one, shapes[path]) for path, r in rules.items() for one in r.each(shapes[path])]
        names = {rule.source for rule, _ in every}
        missing = sorted(names - set(tensors))
        extra = sorted(n for n in set(tensors) - names if not self.spares(n))
        if missing or extra:
            raise InputError(
                f"{where}: {(missing or extra)[0]}",
                found=f"{counted(len(missing), 'tensor')} missing, {len(extra)} unknown",
                expected="each parameter's tensor and no other",
                fix="check that config.json belongs to these weights",
            )
        for rule, whole in every:
            name, shape = rule.source, rule.source_shape(whole)
            if tuple(tensors[name].shape) != shape:
                raise InputError(
                    f"{where}: {name}",
                    found=f"shape {tuple(tensors[name].shape)}",
                    expected=f"{shape} by the config",
                    fix="check that config.json belongs to these weights",
                )
            if tensors[name].dtype not in FLOATS:
                raise InputError(
                    f"{where}: {name}",
                    found=f"dtype {tensors[name].dtype}",
                    expected=", ".join(map(str, FLOATS)),
                    fix="convert the checkpoint first (dequantise it if it is quantised)",
                )
        return rules


def _check_class(values: Values, family: str) -> None:
    """Checks that `architectures`, if given, names a family's causal LM, or its headless model."""
    known = (family + LM, f"{family}Model")
    for name in values.names("architectures"):
        if name.lower() not in map(str.lower, known):  # early folders write LLaMA
            fix = f"{name} is not supported"
            raise values.error("architectures", " or ".join(known), fix)


def _match_one(path: str, patterns: Iterable[tuple[re.Pattern[str], Rule]]) -> Rule:
    found = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(path))]
    assert len(found) == 1, f"{path} has {len(found)} rules"
    (match, rule), number = found[0], found[0][0].groups()
    return replace(rule, source=rule.source.format(*number, "{}"), path=match.group())


def rename(
    names: Iterable[str], prefixes: Iterable[tuple[str, str]]
) -> dict[str, tuple[str, tuple[str, str]]]:
    """Name -> (name with its prefix replaced, the pair used); without names that none fits."""
    prefixes = tuple(prefixes)
    out = {}
    for name in names:
        for old, new in prefixes:
            if name.startswith(old):
                out[name] = (new + name.removeprefix(old), (old, new))
                break
    return out


class Place(NamedTuple):
    """Which tensor of which component one is."""

    part: str
    name: str


Names = tuple[tuple[str, str, str], ...]
"""(prefix in the folder, component, prefix in the component's table), the first that fits."""


def placed(
    names: Iterable[str], prefixes: Iterable[tuple[str, str, str]]
) -> dict[str, tuple[Place, tuple[str, str]]]:
    """Name -> its place, the (old, new) pair of prefixes used; without names that none fits."""
    prefixes = tuple(prefixes)
    out = {}
    for name in names:
        for old, part, new in prefixes:
            if name.startswith(old):
                out[name] = Place(part, new + name.removeprefix(old)), (old, new)
                break
    return out


def restored(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """A name in `rules` under the prefix that it was read by; what `rename` undoes."""
    old, new = next(pair for pair in prefixes if name.startswith(pair[1]))
    return old + name.removeprefix(new)


def norm(source: str, path: str) -> tuple[Rule, ...]:
    """Rules of a layer norm's scale and bias."""
    return Rule(f"{source}.weight", f"{path}/scale"), Rule(f"{source}.bias", f"{path}/bias")


def dense(source: str, path: str, like: str = "") -> tuple[Rule, ...]:
    """Rules of a dense layer's kernel, which another tensor may stand for, and bias."""
    return (
        Rule(f"{source}.weight", f"{path}/kernel", TRANSPOSE, like=like),
        Rule(f"{source}.bias", f"{path}/bias"),
    )
