"""Looking into models: where they look, how alike their features are, which coefficients fuse them.

Not imported by `vfjax` itself. Pictures are drawn by matplotlib, t-SNE is scikit-learn's (extra
"analysis").
"""

from vfjax.analysis.attention import attention, divergence, entropy, readers, shares
from vfjax.analysis.features import linear_cka, mmd, pca, pooled, tsne
from vfjax.analysis.regions import inside, paint, regions
from vfjax.analysis.search import agreement, apart

__all__ = [
    "agreement",
    "apart",
    "attention",
    "divergence",
    "entropy",
    "inside",
    "linear_cka",
    "mmd",
    "paint",
    "pca",
    "pooled",
    "readers",
    "regions",
    "shares",
    "tsne",
]
