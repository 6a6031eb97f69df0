"""The tensors of a quantised module, checked; what its folder's config says of modules by name."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from converters.params.table import FLOATS
from vfjax import InputError
from vfjax.merge import LazyTensor

Tensors = Mapping[str, LazyTensor]


@dataclasses.dataclass(frozen=True)
class Module:
    """A quantised module.

    Attributes:
        name: in the folder.
        tensors: what is left of their names behind the module's -> its tensors.
        taken: those that were asked for.
    """

    name: str
    tensors: Tensors
    taken: set[str] = dataclasses.field(default_factory=set)

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.tensors

    @property
    def where(self) -> str:
        """The module with its file, for errors."""
        path = next((x.path for x in self.tensors.values() if hasattr(x, "path")), "")
        return f"{path}: {self.name}" if path else self.name

    def error(self, leaf: str, found: str, expected: str, fix: str = "") -> InputError:
        """That one of its tensors is not what it should be."""
        return InputError(
            f"{self.where}.{leaf}",
            found=found,
            expected=expected,
            fix=fix or "check that config.json belongs to these weights, or download them again",
        )

    def take(
        self,
        leaf: str,
        shape: tuple[int | None, ...] | None = None,
        dtypes: Sequence[np.dtype] = FLOATS,
    ) -> LazyTensor:
        """One of its tensors.

        Args:
            leaf: its name behind the module's.
            shape: that it must have, None for any size.
            dtypes: that it may have.

        Raises:
            InputError: it is not there, or of another shape or dtype.
        """
        self.taken.add(leaf)
        if leaf not in self.tensors:
            raise self.error(leaf, "no tensor", "it: the module is quantised")
        found = self.tensors[leaf]
        size = tuple(found.shape)
        if shape is not None and (
            len(size) != len(shape)
            or any(b not in (None, a) for a, b in zip(size, shape, strict=True))
        ):
            wanted = str(shape).replace("None", "any")
            raise self.error(
                leaf, f"shape {size}", f"{wanted}, by its other tensors and the config"
            )
        if found.dtype not in dtypes:
            raise self.error(leaf, f"dtype {found.dtype}", ", ".join(map(str, dtypes)))
        return found

    def done(self, unused: Iterable[str] = ()) -> None:
        """Says that all tensors were taken but for those without effect on the weight.

        Raises:
            InputError: another one.
        """
        if left := sorted(set(self.tensors) - self.taken - set(unused)):
            fix = "this kind of quantisation is not supported: take the model it was made from"
            raise self.error(left[0], "a tensor", "no such one beside the others", fix)


def grouped(tensors: Tensors, leaves: Iterable[str]) -> tuple[list[Module], dict[str, LazyTensor]]:
    """Quantised modules, and the tensors that are of none.

    Args:
        tensors: a folder's.
        leaves: patterns of what is left of the names behind a module's.
    """
    pattern = re.compile(rf"(.+?)\.({'|'.join(leaves)})")
    found: dict[str, dict[str, LazyTensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            rest[name] = tensor
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    for name, own in list(found.items()):
        if set(own) == {"weight"} and own["weight"].dtype in FLOATS:
            rest[f"{name}.weight"] = found.pop(name)["weight"]
    return [Module(name, own) for name, own in found.items()], rest


def named(module: str, pattern: str) -> bool:
    """Whether a pattern means a module, as transformers reads it.

    It is the start or the end of its name, or a regular expression
    (quantizers/quantizers_utils.py, should_convert_module).
    """
    whole = rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
    return module.endswith(pattern) or re.match(whole, module) is not None


SAME = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
"""Prefixes of names in transformers' files, and in its memory, of which configs speak."""


def aliases(name: str) -> tuple[str, ...]:
    """A module's name in its file, and in transformers' memory if it has another there."""
    both = [pair for one, two in SAME for pair in ((one, two), (two, one))]
    other = (new + name.removeprefix(old) for old, new in both if name.startswith(old))
    return (name, *other)


def refuse_left_out(
    module: Module, key: str, names: Iterable[str], matches: Callable[[str, str], bool]
) -> None:
    """Raises InputError of a quantised module that the config says is not.

    Args:
        module: the module.
        key: of the config.
        names: what it says.
        matches: whether (the name of a module, one of them) belong together. One that fits a name
            in the file but not the one in memory, or the other way, decides nothing: which of them
            was meant depends on the version that wrote it.
    """
    own = aliases(module.name)
    if found := next((x for x in names if all(matches(name, x) for name in own)), None):
        raise InputError(
            module.where,
            found="a quantised module",
            expected=f"a plain one: {key} has {found!r}",
            fix="check that config.json belongs to these weights",
        )
