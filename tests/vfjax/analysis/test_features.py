"""Distances of features against what they are by definition."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vfjax import InputError
from vfjax import analysis as look
from vfjax.analysis import draw


@pytest.fixture(scope="module")
def features() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 12)), rng.normal(size=(60, 9))


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_knows_no_rotation_and_no_scale(features, debiased: bool) -> None:
    x, _ = features
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    assert look.linear_cka(x, 3 * x @ turn + 7, debiased=debiased) == pytest.approx(1)


def test_debiased_cka_of_independent_features_is_about_zero() -> None:
    rng = np.random.default_rng(2)
    pairs = [(rng.normal(size=(30, 64)), rng.normal(size=(30, 64))) for _ in range(20)]
    assert abs(np.mean([look.linear_cka(*pair, debiased=True) for pair in pairs])) < 0.02
    assert np.mean([look.linear_cka(*pair) for pair in pairs]) > 0.6  # biased: n is small


def test_cka_is_its_formula(features) -> None:
    x, y = (a - a.mean(axis=0) for a in features)
    top = sum((x[:, i] @ y[:, j]) ** 2 for i in range(12) for j in range(9))
    expected = top / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert look.linear_cka(*features) == pytest.approx(expected)


def test_hsic1_is_the_mean_over_four_different_pictures() -> None:
    """Song et al.'s U-statistic, over all ordered quadruples of 7 pictures."""
    rng = np.random.default_rng(3)
    k, m = (a @ a.T for a in rng.normal(size=(2, 7, 3)))
    quadruples = itertools.permutations(range(7), 4)
    h = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quadruples]
    assert look.features.hsic1(k, m) == pytest.approx(np.mean(h))


def test_mmd_is_its_formula() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(8, 3)), rng.normal(2, 1, size=(6, 3))
    both = np.concatenate([x, y])
    scale = np.median([((a - b) ** 2).sum() for a, b in itertools.combinations(both, 2)])

    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / scale)

    own = [np.mean([kernel(a, b) for a, b in itertools.permutations(s, 2)]) for s in (x, y)]
    cross = np.mean([kernel(a, b) for a in x for b in y])
    assert look.mmd(x, y) == pytest.approx(sum(own) - 2 * cross)
    assert abs(look.mmd(*rng.normal(size=(2, 200, 3)))) < 0.02 < 0.2 < look.mmd(x, y)


def test_pca_keeps_distances_and_orders_the_variance(features) -> None:
    x, _ = features
    points, variance = look.pca(x, 12)
    assert variance.sum() == pytest.approx(1) and (np.diff(variance) <= 0).all()
    apart = np.linalg.norm(x[0] - x[1]), np.linalg.norm(points[0] - points[1])
    assert apart[0] == pytest.approx(apart[1])


def test_tsne_is_deterministic_and_separates() -> None:
    x = np.random.default_rng(5).normal(size=(24, 6))
    x[12:] += 20
    one, two = look.tsne(x), look.tsne(x)
    assert one.shape == (24, 2) and (one == two).all()
    middle = one[:12].mean(axis=0), one[12:].mean(axis=0)
    nearer = np.linalg.norm(one[:, None] - middle, axis=-1).argmin(axis=1)
    assert nearer.tolist() == [0] * 12 + [1] * 12


def test_bad_input_is_said() -> None:
    with pytest.raises(InputError, match="at least 4"):
        look.linear_cka(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(InputError, match="one width"):
        look.mmd(np.ones((3, 2)), np.ones((3, 1)))
    assert np.isnan(look.linear_cka(np.ones((5, 2)), np.eye(5)))


def test_agreement_counts_neighbours() -> None:
    answers = [["a", "b"], ["a", "c"], ["a", "c"], ["d", "c"]]
    np.testing.assert_allclose(look.agreement(answers), [0.5, 0.75, 0.75, 0.5])
    np.testing.assert_allclose(look.agreement([["a", "b"], ["a", "c"]]), [0.5, 0.5])


def test_a_split_keeps_clusters_whole() -> None:
    clusters = [f"picture {i // 3}" for i in range(30)]
    out = look.apart(clusters, 0.4, 0)
    held = {c for c, away in zip(clusters, out, strict=True) if away}
    assert len(held) == 4 and out.sum() == 12
    assert (out == look.apart(clusters, 0.4, 0)).all() and (
        out != look.apart(clusters, 0.4, 1)
    ).any()
    assert look.apart(["a", "b"], 0.01, 0).sum() == 1


def test_matrices_below_zero_are_drawn(tmp_path: Path) -> None:
    """As unbiased measures of one branch with itself may be; and those without a number."""
    tables = {"MMD²": np.array([[-0.2]]), "none": np.array([[np.nan]])}
    draw.matrices(tmp_path / "x.png", tables, ["clip"])
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 0
