import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.quantised import lazy
from converters.quantised.lazy import Dequantised, Grid, Whole, kinds, unpack
from vfjax import InputError


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_unpack_is_shifts_of_one_long_number(bits: int, count: int, seed: int):
    words = -(-count * bits // 32)
    packed = np.random.default_rng(seed).integers(0, 2**32, (3, words), np.uint64)
    found = unpack(packed.astype(np.uint32).view(np.int32), bits, count)
    for row, numbers in zip(packed.tolist(), found, strict=True):
        whole = sum(word << 32 * i for i, word in enumerate(row))
        assert numbers.tolist() == [whole >> bits * i & 2**bits - 1 for i in range(count)]


@pytest.mark.parametrize("piece", [1, 12, 1 << 22])
def test_rows_are_dequantised_in_pieces(monkeypatch: pytest.MonkeyPatch, piece: int):
    monkeypatch.setattr(lazy, "PIECE", piece)
    whole, asked = np.arange(40, dtype=np.float32).reshape(10, 4), []

    def rows(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return whole[start:stop]

    tensor = Dequantised("x", (10, 4), np.dtype(np.float16), "kind", rows)
    assert tensor[3:9].tolist() == whole[3:9].tolist() and tensor[3:9].dtype == np.float16
    assert tensor[...].tolist() == whole.tolist() and tensor[4:2].shape == (0, 4)
    assert max(asked) <= max(piece // 4, 1)
    assert kinds([tensor, whole, tensor]) == ("kind",)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_what_is_not_finite_is_refused(value: float):
    tensor = Dequantised(
        "m.st: x", (2, 2), np.dtype(np.float16), "kind", lambda a, b: np.full((b - a, 2), value)
    )
    with pytest.raises(InputError, match="m.st: x: found NaN or infinity where it is dequantised"):
        tensor[0:1]


def test_the_last_packed_tensors_are_kept(monkeypatch: pytest.MonkeyPatch):
    """As many as fit, so that rows of a weight that stands transposed are not read anew each."""
    reads = []

    class Counted:
        shape, dtype = (4,), np.dtype(np.int32)

        def __getitem__(self, rows: object) -> np.ndarray:
            reads.append(self)
            return np.zeros(4, np.int32)

    monkeypatch.setattr(Whole, "kept", type(Whole.kept)())
    monkeypatch.setattr(lazy, "HELD", 40)
    wholes = [Whole(Counted()) for _ in range(3)]
    for i in (0, 1, 0, 1, 2, 1, 0):
        wholes[i].read()
    assert [wholes.index(next(w for w in wholes if w.tensor is x)) for x in reads] == [0, 1, 2, 0]
    assert sum(x.nbytes for x in Whole.kept.values()) <= 40


def test_grids():
    values = np.arange(6.0).reshape(2, 3)
    grid = Grid(lambda a, b: values[a:b], 2, 2)
    expected = values.repeat(2, 0).repeat(2, 1)
    for start, stop in ((0, 4), (1, 3), (3, 4)):
        np.testing.assert_array_equal(grid(start, stop, 5), expected[start:stop, :5])
    places = Grid(lambda a, b: values[a:b], 1, 2, Whole(np.array([2, 0, 0, 1])))
    np.testing.assert_array_equal(places(1, 2, 4), [[5, 3, 3, 4]])
