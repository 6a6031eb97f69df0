"""What tensors are called in the files of a folder that is written like another.

`visual.blocks.0.attn.qkv.weight` or `multi_modal_projector.linear_1.weight`; those of a tower that
gets a sub-folder have its name before theirs:
`vision_tower/vision_model.encoder.layers.0.mlp.fc1.weight`.
"""

import dataclasses
from collections.abc import Mapping

from converters.export import folder_of
from converters.params.table import placed, rename
from converters.source import LAYOUTS, Layout, Source
from converters.towers import Tensors
from vfjax.merge import LazyTensor

Parts = Mapping[str, Mapping[str, LazyTensor]]
"""Component -> name in its table -> tensor."""


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """What the tensors of each component are called in the folder that is written.

    Attributes:
        like: the model whose layout it has.
        spare: component -> name in its table -> name in `like`'s files, of those it does not read.
    """

    like: Source
    spare: Mapping[str, Mapping[str, str]]

    def __call__(self, part: str, name: str) -> str:
        """Of a component's tensor, by its name in the table."""
        folder = folder_of(part, self.like.towers)
        found = self.spare.get(part, {}).get(name)
        if found is None:
            old, new = self.prefix(part, name)
            found = old + name.removeprefix(new)
        return f"{folder}/{found}" if folder else found

    def prefix(self, part: str, name: str) -> tuple[str, str]:
        """The (prefix in the files, prefix in the table) of a tensor."""
        known = [x for x in self.like.prefixes.get(part, ()) if name.startswith(x[1])]
        if not known:  # a head that `like` is without
            pairs = [(old, new) for old, own, new in _prefixes(self.like) if own == part]
            known = sorted((x for x in pairs if name.startswith(x[1])), key=lambda x: x[0] != x[1])
        return known[0]


def layout_of(source: Source) -> Layout:
    """The layout that a folder was read by."""
    return next(x for x in LAYOUTS if x.name == source.layout)


def _prefixes(source: Source) -> tuple[tuple[str, str, str], ...]:
    return layout_of(source).prefixes(source)


def spare_names(source: Source) -> dict[str, dict[str, str]]:
    """Component -> name in its table -> name in the files, of tensors that it may not read."""
    out = {}
    for part, tensors in source.spare.items():
        if part in source.towers:
            found = {x: new for x, (new, _) in rename(tensors, source.table(part).prefixes).items()}
        else:
            places = placed(tensors, _prefixes(source))
            found = {x: place.name for x, (place, _) in places.items()}
        out[part] = {found.get(x, x): x for x in tensors}
    return out


def named(names: TensorNames, source: Source, parts: Parts) -> tuple[dict[str, Tensors], set[str]]:
    """All tensors that a model has, and the names of those that it may not read.

    Args:
        names: of the result.
        source: the model.
        parts: those of its tensors that are read.

    Returns:
        Component -> what the written folder calls it -> tensor; such names.
    """
    out = {part: {names(part, n): x for n, x in tensors.items()} for part, tensors in parts.items()}
    loose = set()
    for part, spare in spare_names(source).items():
        for name, own in spare.items():
            if part == "llm" and name.startswith("lm_head"):  # heads are settled before
                continue
            called = names(part, name)
            if called not in out.setdefault(part, {}):
                loose.add(called)
                out[part][called] = source.spare[part][own]
    return out, loose


def by_folder(weights: Mapping[str, LazyTensor]) -> dict[str, Tensors]:
    """Sub-folder -> name -> tensor, of tensors by what the written folder calls them."""
    out: dict[str, Tensors] = {"": {}}
    for called, tensor in weights.items():
        folder, _, name = called.rpartition("/")
        out.setdefault(folder, {})[name] = tensor
    return out
