"""Merging of language models of one base: formulas on arrays, an engine over named tensors."""

from vfjax.merge.engine import LazyTensor, aligned, blocks, merge
from vfjax.merge.family import check_family
from vfjax.merge.methods import METHODS, linear, register, task_arithmetic

__all__ = [
    "METHODS",
    "LazyTensor",
    "aligned",
    "blocks",
    "check_family",
    "linear",
    "merge",
    "register",
    "task_arithmetic",
]
