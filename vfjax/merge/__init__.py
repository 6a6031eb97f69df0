"""Merging of language models of one base: formulas on arrays, an engine over named tensors."""

from vfjax.merge.compatibility import check_family
from vfjax.merge.engine.account import Account
from vfjax.merge.engine.merged import Merged
from vfjax.merge.engine.merger import Merger, merge
from vfjax.merge.engine.mesh import merge_arrays
from vfjax.merge.mergekit import from_mergekit
from vfjax.merge.methods import matrix, ram, sparse, sphere  # noqa: F401 (each registers its own)
from vfjax.merge.methods.elementwise import linear, task_arithmetic
from vfjax.merge.methods.registry import METHODS, register
from vfjax.merge.recipe import Recipe, from_config
from vfjax.merge.tensors import Inner, LazyTensor, Stacked, aligned, blocks, equal

__all__ = [
    "METHODS",
    "Account",
    "Inner",
    "LazyTensor",
    "Merged",
    "Merger",
    "aligned",
    "blocks",
    "check_family",
    "equal",
    "Recipe",
    "Stacked",
    "from_config",
    "from_mergekit",
    "linear",
    "merge",
    "merge_arrays",
    "register",
    "task_arithmetic",
]
