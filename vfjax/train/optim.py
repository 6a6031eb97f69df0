"""What trains, how fast: groups of parameters, schedules, the optimiser of a stage."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax
from flax import nnx

from vfjax.errors import InputError, require


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that train alike.

    Attributes:
        pattern: regular expression that a parameter's name, such as
            "branches/clip/connector/projector/layers/0/kernel", matches from its start.
        learning_rate: peak of the schedule.
        weight_decay: of matrices; vectors (biases, scales) never decay, as in LLaVA's trainer.

    Raises:
        InputError: a negative number.
    """

    pattern: str
    learning_rate: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        where = f"group {self.pattern!r}"
        require(self.learning_rate >= 0, where, f"rate {self.learning_rate}", "at least 0")
        require(self.weight_decay >= 0, where, f"decay {self.weight_decay}", "at least 0")


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with a schedule and clipping.

    Attributes:
        steps: of the whole stage.
        warmup: share of the steps over which the rate rises linearly from 0.
        schedule: how it falls to 0 afterwards, or that it stays.
        clip: largest norm of all gradients together; None does not clip.
        b1: decay of the gradients' mean.
        b2: decay of the squared gradients' mean.
        eps: added to the root of the latter.

    Raises:
        InputError: a number out of range.
    """

    steps: int
    warmup: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        require(0 <= self.warmup <= 1, "warmup", self.warmup, "a share of the steps, 0 to 1")
        require(self.clip is None or self.clip > 0, "clip", self.clip, "more than 0, or None")

    def rate(self, peak: float) -> optax.Schedule:
        """Learning rate of each step, 0-based; transformers' get_{cosine,linear}_schedule.

        Raises:
            InputError: no such schedule.
        """
        rising = math.ceil(self.warmup * self.steps)
        rest = max(self.steps - rising, 1)
        falls = {
            "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
            "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
            "constant": lambda: optax.constant_schedule(peak),
        }
        if self.schedule not in falls:
            raise InputError(
                "schedule", found=repr(self.schedule), expected=", ".join(falls), fix="choose one"
            )
        fall = falls[self.schedule]()
        if not rising:
            return fall
        return optax.join_schedules([optax.linear_schedule(0.0, peak, rising), fall], [rising])

    def build(self, groups: Sequence[Group]) -> optax.GradientTransformation:
        """The optimiser of parameters in which `split` left what the groups name.

        Clipping comes first and sees all groups' gradients as one vector, as
        torch.nn.utils.clip_grad_norm_ does.
        """
        each = {
            str(i): optax.adamw(
                self.rate(group.learning_rate),
                self.b1,
                self.b2,
                self.eps,
                weight_decay=group.weight_decay,
                mask=_matrices,
            )
            for i, group in enumerate(groups)
        }

        def labels(params: nnx.State) -> nnx.State:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: str(_first(groups, name_of(path))), params
            )

        parts = [optax.partition(each, labels)]
        if self.clip is not None:
            parts.insert(0, optax.clip_by_global_norm(self.clip))
        return optax.chain(*parts)


def name_of(path: Sequence[object]) -> str:
    """A parameter's name, "llm/blocks/0/attn/q/kernel", of its path in a pytree or NNX state."""
    words = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))) for key in path]
    if words[-1] == "value":  # NNX's own leaf in a variable
        words.pop()
    return "/".join(map(str, words))


def named(tree: object) -> dict[str, Any]:
    """Name -> leaf of a pytree, in its order; see `name_of`."""
    return {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def trains(groups: Sequence[Group], name: str) -> bool:
    """Whether one of the groups has the parameter."""
    return _first(groups, name) is not None


def _first(groups: Sequence[Group], name: str) -> int | None:
    return next((i for i, g in enumerate(groups) if re.match(g.pattern, name)), None)


def _matrices(params: nnx.State) -> nnx.State:
    return jax.tree.map(lambda x: x.ndim > 1, params)
