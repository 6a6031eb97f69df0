"""What visual tokens ask for within the LLM, behind some of its layers: twin of `fusion.deep`.

What asks goes through the LLM as an argument that its layers do not read, to a hook of each layer:
so it is there, too, when a layer is computed again for its gradients.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from converters.hf.branch import Branch, VisualTokens

ASKED = "asked"
"""The argument of the LLM's layers."""


@dataclasses.dataclass(frozen=True, eq=False)
class Asking:
    """A branch whose tokens ask for more of the picture.

    Attributes:
        branch: whose `Branch.within` answers.
        seen: what it reads, see `VisualTokens.seen`.
        at: int64[b, t] which of these tokens stands here, -1: none of them.
    """

    branch: Branch
    seen: tuple[Tensor, ...]
    at: Tensor

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        """Hidden states [b, t, d] after a layer, those of the branch's tokens moved on."""
        if layer not in self.branch.layers:
            return x
        flat = self.at.flatten()
        here = (flat >= 0).nonzero()[:, 0]
        own, device = here.to(x.device), self.seen[0].device
        tokens = flat[here].to(device)
        states = x.flatten(0, 1)
        asked = [each[tokens] for each in self.seen]
        found = self.branch.within(layer, states[own].to(device), asked).to(states)
        return states.index_add(0, own, found).view_as(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """All that ask; no tuple, whose parts accelerate would move to each layer's device."""

    each: tuple[Asking, ...]


class Hook:
    """Behind a layer of the LLM."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: Tensor,
    ) -> Tensor:
        """The layer's output with what its tokens asked for."""
        del module, args
        asked = kwargs.get(ASKED)
        for asking in asked.each if isinstance(asked, Asked) else ():
            output = asking(self.layer, output)
        return output


def listen(llm: nn.Module, branches: Iterable[Branch]) -> None:
    """Puts a hook behind each layer of an LLM that tokens of some branch ask behind."""
    for layer in sorted({layer for branch in branches for layer in branch.layers}):
        llm.layers[layer].register_forward_hook(Hook(layer), with_kwargs=True)


def asking(
    visual: Tensor, mask: Tensor, memories: Sequence[VisualTokens], branches: Iterable[Branch]
) -> Asked | None:
    """Who asks; None: nobody.

    Args:
        visual: int64[b, t], see `vfjax.model.Batch`.
        mask: bool[b, t], where something is read.
        memories: one a branch.
        branches: theirs.
    """
    found, first = list[Asking](), 0
    for memory, branch in zip(memories, branches, strict=True):
        if memory.seen is not None:
            own = visual - first
            read = mask & (own >= 0) & (own < len(memory.seen[0]))
            found.append(Asking(branch, memory.seen, own.where(read, -1)))
        first += len(memory.values)
    return Asked(tuple(found)) if found else None
