"""How alike the visual tokens of several members are: CKA, MMD, and pictures of both.

Compared are the same n pictures, one vector each: the mean of a branch's visual tokens after the
connector, in the LLM's input space. None of these numbers means anything without n.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.errors import InputError
from vfjax.eval.extras import needs
from vfjax.model import Batch, Model

Array = jax.Array
Matrix = np.ndarray


@jax.jit
def pooled(model: Model, batch: Batch) -> Array:
    """The mean of each branch's visual tokens, float32[b, branches, d], of a row's pictures."""
    x, mask = model.embed(batch)
    mask &= jnp.asarray(batch.visual) >= 0
    owner, count = jnp.asarray(batch.segments), len(model.config.branches)
    mine = (owner[..., None] == jnp.arange(1, count + 1)) & mask[..., None]
    total = jnp.einsum("btk,btd->bkd", mine.astype(jnp.float32), x.astype(jnp.float32))
    return total / jnp.maximum(mine.sum(axis=1), 1)[..., None]


def linear_cka(x: Matrix, y: Matrix, *, debiased: bool = False) -> float:
    """Linear centred kernel alignment of two sets of features of the same pictures.

    Biased: |Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|) in Frobenius norms, of centred features (Kornblith et
    al., arXiv 1905.00414, section 3), which is high for anything where n is not far above the
    widths. Debiased (Nguyen et al., arXiv 2010.15327, equation 3): of HSIC_1 in place of HSIC,
    about zero for independent features at any n, below zero too.

    Args:
        x: float[n, d].
        y: float[n, e] of the same pictures.
        debiased: which.

    Returns:
        1 for features that are equal up to a rotation and a factor; NaN if all of x or y are equal.

    Raises:
        InputError: other numbers of pictures, or fewer than 4.
    """
    if len(x) != len(y) or len(x) < 4:
        raise InputError(
            "linear_cka",
            found=f"features of {len(x)} and {len(y)} pictures",
            expected="of the same pictures, at least 4",
            fix="pass more",
        )
    centred = [np.asarray(a, np.float64) - np.mean(a, axis=0, dtype=np.float64) for a in (x, y)]
    kernels = [a @ a.T for a in centred]
    measure = hsic1 if debiased else _trace
    both, own, other = (measure(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 0), (1, 1)))
    return both / np.sqrt(own * other) if own > 0 and other > 0 else float("nan")


def _trace(k: Matrix, m: Matrix) -> float:
    """tr(K M) of centred kernels, HSIC_0 but for a factor."""
    return float((k * m).sum())


def hsic1(k: Matrix, m: Matrix) -> float:
    """The unbiased estimator HSIC_1 (Song et al., JMLR 13, 2012, equation 5).

    Args:
        k: float64[n, n] kernel matrix, n above 3.
        m: the same of the other features.
    """
    n = len(k)
    k, m = (a - np.diag(np.diag(a)) for a in (k, m))
    sums = k.sum() * m.sum() / ((n - 1) * (n - 2))
    cross = 2 * (k.sum(axis=0) @ m.sum(axis=0)) / (n - 2)
    return float(((k * m).sum() + sums - cross) / (n * (n - 3)))


def mmd(x: Matrix, y: Matrix) -> float:
    """The square of the maximum mean discrepancy, unbiased, of a Gaussian kernel.

    MMD_u^2 (Gretton et al., JMLR 13, 2012, equation 3) of exp(-|a - b|^2 / m), m the median of the
    squared distances between all features of both (the median heuristic, section 8 there). About
    zero, below it too, for features of one distribution; 2 is the most.

    Args:
        x: float[n, d].
        y: float[m, d].

    Raises:
        InputError: other widths, or fewer than two of one.
    """
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise InputError(
            "mmd",
            found=f"features {list(x.shape)} and {list(y.shape)}",
            expected="one width, at least 2 of each",
            fix="compare members with LLMs of one width, on more pictures",
        )
    both = np.concatenate([x, y]).astype(np.float64)
    squares = (both**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * both @ both.T, 0)
    median = np.median(distances[np.triu_indices(len(both), 1)])
    kernel = np.exp(-distances / max(median, np.finfo(float).tiny))
    n = len(x)
    own, other = kernel[:n, :n], kernel[n:, n:]
    means = [(a.sum() - np.trace(a)) / (len(a) * (len(a) - 1)) for a in (own, other)]
    return float(sum(means) - 2 * kernel[:n, n:].mean())


def pca(x: Matrix, count: int = 2) -> tuple[Matrix, Matrix]:
    """The first principal components.

    Args:
        x: float[n, d].
        count: of the components.

    Returns:
        float64[n, count] coordinates, the sign such that each component's largest weight is
        positive; and float64[count], the share of the variance.
    """
    centred = np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64)
    left, values, axes = np.linalg.svd(centred, full_matrices=False)
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)[:, 0]
    points = left * values * np.where(largest < 0, -1, 1)
    return points[:, :count], (values**2 / max((values**2).sum(), 1e-30))[:count]


def tsne(x: Matrix, *, seed: int = 0) -> Matrix:
    """scikit-learn's t-SNE, float32[n, 2], of the first 50 principal components; slow.

    Args:
        x: float[n, d], n above 3.
        seed: of the embedding.
    """
    manifold = needs("sklearn.manifold", "analysis", "scikit-learn", "tsne")
    points, _ = pca(x, min(50, *x.shape))
    perplexity = min(30.0, (len(x) - 1) / 3)
    return manifold.TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(points)
