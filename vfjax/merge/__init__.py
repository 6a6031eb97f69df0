"""Merging of language models of one base: formulas on arrays, an engine over named tensors."""

from vfjax.merge import matrix, ram, sparse, sphere  # noqa: F401 (each registers its methods)
from vfjax.merge.account import Account
from vfjax.merge.elementwise import linear, task_arithmetic
from vfjax.merge.engine import Merged, Merger, merge
from vfjax.merge.family import check_family
from vfjax.merge.mergekit import from_mergekit
from vfjax.merge.mesh import merge_arrays
from vfjax.merge.methods import METHODS, register
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
