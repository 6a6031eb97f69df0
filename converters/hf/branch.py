"""The contract of a member family's visual path in torch: the twin of `vfjax.architectures.base`.

A `Branch` is made of the same frozen config as the JAX module of its family. Its parameters have
the names that they have in a fused folder under `branches.NAME.`, so that a folder is loaded as it
is. A new family is a file beside this one, which `converters.hf` imports by looking.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from converters.hf import encoders
from vfjax import InputError
from vfjax.architectures import Architecture

Inputs = Mapping[str, Any]
"""What a branch's encoders are shown: the fields of its family's `Inputs` by their names, those of
a mapping as "others.NAME"; arrays are tensors."""

States = dict[str, list[Tensor]]
"""Encoder -> hidden states at the taps, each [n, s, d]."""

Embed = Callable[[Tensor], Tensor]
"""The LLM's embedding table, not scaled: int64[...] ids -> [..., d]."""


class Prompt(NamedTuple):
    """The words that stand around each picture or frame; see `vfjax.architectures.base.Prompt`.

    Attributes:
        ids: int64[n, l].
        mask: bool[n, l], False at padding.
    """

    ids: Tensor
    mask: Tensor


class VisualTokens(NamedTuple):
    """A branch's memory; see `vfjax.architectures.base.VisualTokens`.

    Attributes:
        values: [m, d] in the LLM's width.
        keep: bool[m], False at tokens that the connector leaves out.
        deep: [k, m, d], what is added after each of the LLM's first k layers; None: nothing.
        seen: of the first of the tokens, what `Branch.within` reads; None: nothing.
    """

    values: Tensor
    keep: Tensor
    deep: Tensor | None = None
    seen: tuple[Tensor, ...] | None = None


class Branch(nn.Module):
    """Pictures -> visual tokens: encoders, tapped, and a connector that the family adds."""

    def __init__(self, architecture: Architecture):
        """Builds the encoders, each a module of its name.

        Args:
            architecture: the family's config (`vfjax.architectures`).
        """
        super().__init__()
        self.architecture: Any = architecture  # whose connector a family knows
        for name, config in architecture.encoders.items():
            self.add_module(name, encoders.build(config))

    def encode(self, inputs: Inputs) -> States:
        """Hidden states at the connector's taps."""
        taps = self.architecture.connector.taps
        first, *_ = self.architecture.encoders
        return {
            name: encoders.tapped(
                config,
                self.get_submodule(name),
                inputs["pixels" if name == first else f"others.{name}"],
                taps[name],
            )
            for name, config in self.architecture.encoders.items()
        }

    layers: tuple[int, ...] = ()
    """Of the LLM, behind which its tokens ask for more."""

    def within(self, layer: int, x: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """What is added to hidden states of the LLM at the branch's own tokens.

        Args:
            layer: behind which, one of `layers`.
            x: [k, d] of these tokens.
            seen: of `VisualTokens.seen` the rows of these tokens.
        """
        raise NotImplementedError

    def visual_tokens(
        self, states: States, embed: Embed, prompt: Prompt | None = None
    ) -> VisualTokens:
        """The branch's memory.

        Args:
            states: of `encode`.
            embed: the LLM's embedding table.
            prompt: of architectures that read it.
        """
        raise NotImplementedError


def all_of(features: Tensor) -> VisualTokens:
    """A memory of all tokens [n, s, d], a picture after another."""
    flat = features.flatten(0, 1)
    return VisualTokens(flat, torch.ones(len(flat), dtype=torch.bool, device=flat.device))


def gathered(memory: VisualTokens, indices: Tensor, weights: Tensor | None) -> VisualTokens:
    """The memory with more tokens, made of others, behind it.

    Args:
        memory: of m tokens.
        indices: int64[k, p], see `vfjax.architectures.base.Gather`.
        weights: float32[k, p]; None takes the largest of the values.
    """

    def more(x: Tensor) -> Tensor:
        if weights is None:
            made = x[..., indices, :].amax(-2)
        else:
            parts = (
                weights[:, k, None] * x[..., indices[:, k], :].float()
                for k in range(indices.shape[1])
            )
            made = sum(parts).to(x.dtype)
        return torch.cat([x, made], dim=-2)

    indices = indices.to(memory.values.device)
    weights = None if weights is None else weights.to(memory.values.device)
    keep = memory.keep[indices]
    if weights is not None:
        keep = keep | (weights == 0)
    deep = None if memory.deep is None else more(memory.deep)
    kept = torch.cat([memory.keep, keep.all(1)])
    return VisualTokens(more(memory.values), kept, deep, memory.seen)


def joined(memories: Sequence[VisualTokens]) -> VisualTokens:
    """One memory of all, of what is seen none.

    What some add to more layers than others is zero in these.
    """
    device = memories[0].values.device
    layers = max(0 if m.deep is None else len(m.deep) for m in memories)

    def deep(memory: VisualTokens) -> Tensor:
        zeros = memory.values.new_zeros((layers, *memory.values.shape))
        if memory.deep is None:
            return zeros
        return torch.cat([memory.deep.to(zeros), zeros[len(memory.deep) :]])

    return VisualTokens(
        torch.cat([memory.values.to(device) for memory in memories]),
        torch.cat([memory.keep.to(device) for memory in memories]),
        torch.cat([deep(memory).to(device) for memory in memories], dim=1) if layers else None,
    )


BRANCHES: dict[str, type[Branch]] = {}
"""Name of an architecture's class -> the class of its branch."""

Class = TypeVar("Class", bound=type[Branch])


def register(*names: str) -> Callable[[Class], Class]:
    """Adds a class to `BRANCHES`.

    Args:
        names: of the architectures' classes that it is for.

    Raises:
        ValueError: there is another for one of them.
    """

    def add(own: Class) -> Class:
        for name in names:
            if BRANCHES.setdefault(name, own) is not own:
                raise ValueError(f"{own.__name__}: another branch is for {name!r}, too")
        return own

    return add


def kind_of(architecture: Architecture, where: str) -> type[Branch]:
    """The class of an architecture's branch.

    Args:
        architecture: a config of `vfjax.architectures`.
        where: what to call it in errors.

    Raises:
        InputError: there is none in torch.
    """
    name = type(architecture).__name__
    if name not in BRANCHES:
        raise InputError(
            where,
            found=f"architecture {name}",
            expected=f"one that converters.hf has: {', '.join(sorted(BRANCHES))}",
            fix="run this model by converters.load, in JAX",
        )
    return BRANCHES[name]


def build(architecture: Architecture, where: str) -> Branch:
    """The branch of an architecture; arguments and errors as of `kind_of`."""
    return kind_of(architecture, where)(architecture)
