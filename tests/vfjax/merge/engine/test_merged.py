import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vfjax.merge.families import BF16, F16, F32, Spy, arguments, family, run
from vfjax import InputError
from vfjax.merge import METHODS, Merger, merge
from vfjax.merge import tensors as lazy
from vfjax.merge.engine import kernels

pytestmark = pytest.mark.usefixtures("optimised")


@settings(max_examples=8)
@given(st.data())
@pytest.mark.parametrize("method", METHODS)
def test_how_it_is_cut_does_not_change_a_byte(method, data):
    count, params = arguments(method)
    shape = data.draw(st.sampled_from([(37,), (13, 37)]))
    dtype = BF16 if len(shape) == 1 else F32
    base, members = family(count, n=int(np.prod(shape)), dtype=dtype)
    named = {f"m{i}": {"w": x.reshape(shape)} for i, x in enumerate(members)}
    tensor = merge({"w": base.reshape(shape)}, named, method, params)["w"]
    whole = tensor[...]
    assert whole.shape == shape
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=4)))
    block = data.draw(st.sampled_from([1, 16, 100, 1 << 20]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "BLOCK", block)
        parts = [tensor[a:b] for a, b in zip([0, *cuts], [*cuts, shape[0]], strict=True)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_what_a_draw_keeps_is_found_once(method, monkeypatch):
    """The second pass reads the bits that the first left; without room for them it draws again."""
    monkeypatch.setattr(lazy, "BLOCK", 64)
    base, members = family(3, n=8 * 64)
    draw, calls = kernels.draw, []

    def drawn(start, keys, size):
        calls.append(int(start))
        return draw(start, keys, size)

    monkeypatch.setattr(kernels, "draw", drawn)
    params = {"weights": (0.5, 0.3, 0.2), "density": 0.6, "rescale": "norm"}
    named = [(f"m{i}", x.reshape(16, 32)) for i, x in enumerate(members)]
    results = {}
    for room, times in ((1 << 28, 1), (0, 2), (5 * 3 * 64, 2)):
        merger = Merger()
        tensor = merger.add("w", method, params, named, ("base", base.reshape(16, 32)))
        tensor.operation.masks.room = room
        calls.clear()
        results[room] = tensor[...].tobytes()
        assert len(calls) == 8 * times or (room and 8 < len(calls) <= 16)
        assert tensor.operation.masks.room == room  # all is given back
    assert len(set(results.values())) == 1


def test_scalars_and_empty_tensors():
    one = {"scalar": np.asarray(1.0, BF16), "none": np.zeros((0, 3), BF16)}
    three = {"scalar": np.asarray(3.0, BF16), "none": np.zeros((0, 3), BF16)}
    merged = merge(None, {"a": one, "b": three}, "linear", {"weights": (1, 1)})
    assert merged["scalar"][...].shape == () and merged["scalar"][...] == 2
    assert merged["none"][...].shape == merged["none"][0:0].shape == (0, 3)


def test_nothing_is_read_before_it_is_asked_for_and_no_more_than_that(monkeypatch):
    monkeypatch.setattr(lazy, "BLOCK", 64)
    base, members = family(2, n=100 * 8)
    spies = [Spy(x.reshape(100, 8)) for x in (base, *members)]
    merged = merge(
        {"w": spies[0]},
        {"a": {"w": spies[1]}, "b": {"w": spies[2]}},
        "task_arithmetic",
        {"weights": (0.5, 0.5)},
    )
    assert not any(spy.reads for spy in spies)
    merged["w"][10:30]
    for spy in spies:
        assert [(r.start, r.stop) for r in spy.reads] == [(10, 18), (18, 26), (26, 30)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad,dtype", [(np.nan, BF16), (np.inf, F16), (-np.inf, F32)])
def test_nonfinite_sources_are_named_and_counted(method, bad, dtype):
    count, params = arguments(method)
    labels = ["base", *(f"member 'm{i}'" for i in range(count))]
    for i in range(1 if METHODS[method].base == "unread" else 0, len(labels)):
        sources = [np.full((50, 3), 1 + j / 8, dtype) for j, _ in enumerate(labels)]
        sources[i][7, 1] = sources[i][49, 2] = bad
        with pytest.raises(InputError, match=f"^{labels[i]}: w: found 2 NaN or infinite of 150"):
            run(method, sources[0], sources[1:], **params)


def test_results_out_of_range_are_errors():
    big = np.full(4, 6e4, F16)
    with pytest.raises(InputError, match="^w: found finite sources, but .* not finite in float16"):
        run("linear", None, [big, big], weights=(1, 1), normalize=False)
    assert run("linear", None, [big, big], dtype=BF16, weights=(1, 1), normalize=False)[0] > 1e5
    with pytest.raises(InputError, match="not summing to 0"):
        run("linear", None, [big, big], weights=(1, -1))
