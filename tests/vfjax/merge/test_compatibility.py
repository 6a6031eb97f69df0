"""Whether weights have one origin: what is refused, and that fine-tunes are not."""

import numpy as np
import pytest

from vfjax import InputError
from vfjax.merge.compatibility import check_weights

KINDS = {
    "self_attn.q_proj": (48, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.o_proj": (32, 48),
    "mlp.gate_proj": (80, 32),
    "mlp.down_proj": (32, 80),
}
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def model(seed: int, vocab: int = 300, layers: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {
        f"model.layers.{i}.{kind}.weight": rng.standard_normal(shape)
        for i in range(layers)
        for kind, shape in KINDS.items()
    }
    out |= {name: rng.standard_normal((vocab, 32)) for name in TABLES}
    return {"model.norm.weight": rng.standard_normal(32), **out}


def tuned(base: dict[str, np.ndarray], size: float, seed: int) -> dict[str, np.ndarray]:
    """Moved by a random delta of `size` times the base's length."""
    rng = np.random.default_rng(seed)
    return {name: x + size * rng.standard_normal(x.shape) for name, x in base.items()}


@pytest.mark.parametrize("part", [*KINDS, *TABLES])
def test_any_kind_of_another_origin_is_refused(part: str):
    base, other = model(0), model(1)
    member = tuned(base, 0.1, 2)
    member |= {name: x for name, x in other.items() if part in name}
    line = rf"^b: .*{part}.*: found weights with a cosine of -?0\.[01]"
    with pytest.raises(InputError, match=line):
        check_weights({"base": base, "a": tuned(base, 0.1, 3), "b": member})


@pytest.mark.parametrize("vocab", [290, 310])
def test_tables_of_other_sizes_are_compared_by_their_common_rows(vocab: int):
    base = model(0)
    member, anew = tuned(base, 0.1, 1), model(9, vocab)[TABLES[0]]
    with pytest.raises(InputError, match="embed_tokens"):
        check_weights({"base": base, "a": {**member, TABLES[0]: anew}})
    rows = min(vocab, 300)
    anew[:rows] = member[TABLES[0]][:rows]
    check_weights({"base": base, "a": {**member, TABLES[0]: anew}})


@pytest.mark.parametrize("size", [0.5, 1.0, 1.5])
def test_a_large_delta_is_no_alarm(size: float):
    for seed in range(40):
        base = model(seed)
        check_weights({"base": base, "a": tuned(base, size, seed + 100)})
