"""Self-distillation, as DINOv2 is trained (arXiv 2304.07193), small: no label, no caption.

A student sees a scene in other colours and with patches blacked out, its teacher, the mean of past
students, the whole scene in yet other colours. The class token predicts the teacher's (DINO,
arXiv 2104.14294), each patch the teacher's patch there (iBOT, arXiv 2111.07832). Left out of
DINOv2: local crops, Sinkhorn's centring, KoLeo.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.family import encoders
from experiments.family.scenes import Scenes

Array = jax.Array
Report = Callable[[str], object]
PROTOTYPES = 128
STUDENT, TEACHER = 0.1, 0.05  # temperatures
HIDDEN = 0.3  # share of patches that the student doesn't see

Carry = tuple[nnx.State, nnx.State, optax.OptState, Array]
"""Student, teacher, the optimiser's state, what the teacher's scores are centred at."""


def train_distilled(
    scenes: Scenes,
    *,
    steps: int = 600,
    batch: int = 96,
    rate: float = 1e-3,
    momentum: float = 0.99,
    seed: int = 0,
    every: int = 25,
    report: Report = print,
) -> nnx.Module:
    """A DINOv2 tower (`encoders.DINO`), the teacher of the last step.

    Args:
        scenes: whose pictures are seen, their labels not.
        steps: a multiple of `every`.
        batch: pictures of a step.
        rate: AdamW's peak, after 30 steps or half of all, with a cosine to zero.
        momentum: share of the teacher that stays from step to step.
        seed: of weights and data.
        every: steps of a compiled scan, and between reports.
        report: called with a line of text.
    """
    head = nnx.Linear(encoders.WIDTH, PROTOTYPES, rngs=nnx.Rngs(seed + 1))
    graph, student = nnx.split(nnx.List([encoders.new(encoders.DINO, seed), head]))
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(30, steps // 2), steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.04))
    places = encoders.GRID**2 + 1

    def assign(params: nnx.State, pictures: Array) -> Array:
        """Scores float32[n, places, prototypes] of the class token and the patches."""
        tower, head = nnx.merge(graph, params)
        state = tower(encoders.pixels(pictures, encoders.DINO_IMAGES), [-1], norm=True)[0]
        return head(state / jnp.linalg.norm(state, axis=-1, keepdims=True) * state.shape[-1] ** 0.5)

    def loss(student: nnx.State, targets: Array, pictures: Array) -> Array:
        return optax.softmax_cross_entropy(assign(student, pictures) / STUDENT, targets).mean()

    def step(carry: Carry, data: tuple[Array, ...]) -> tuple[Carry, Array]:
        student, teacher, state, centre = carry
        pictures, mix, seen = data
        one, other = (jnp.einsum("nyxc,ncd->nyxd", pictures.astype(jnp.float32), m) for m in mix)
        scores = assign(teacher, other)
        # Centred at each place by itself: else a place's own prototype would satisfy everything.
        targets = jax.nn.softmax((scores - centre) / TEACHER, axis=-1)
        value, grads = jax.value_and_grad(loss)(student, targets, one * seen[..., None])
        updates, state = tx.update(grads, state, student)
        student = optax.apply_updates(student, updates)
        teacher = jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, teacher, student)
        centre = 0.9 * centre + 0.1 * scores.mean(axis=0)
        return (student, teacher, state, centre), value

    run = jax.jit(functools.partial(jax.lax.scan, step))
    carry: Carry = (student, student, tx.init(student), jnp.zeros((places, PROTOTYPES)))
    for first in range(0, steps, every):
        carry, losses = run(carry, _batches(scenes, batch, seed, first, every))
        report(f"distilled: step {first + every}, loss {losses.mean():.3f}")
    return nnx.merge(graph, carry[1])[0]


def _batches(
    scenes: Scenes, batch: int, seed: int, first: int, count: int
) -> tuple[np.ndarray, ...]:
    """Pictures, two colour maps of each, and the pixels that the student sees; stacked by step."""
    rng = np.random.default_rng([seed, first])
    rows = rng.integers(len(scenes), size=(count, batch))
    mix = encoders.mixes(count * 2 * batch, rng).reshape(count, 2, batch, 3, 3)
    shown = rng.random((count, batch, encoders.GRID, encoders.GRID)) >= HIDDEN
    seen = shown.repeat(encoders.PATCH, axis=2).repeat(encoders.PATCH, axis=3)
    return scenes.pictures[rows], mix, seen
