"""Fused models in PyTorch: folders that `converters.fuse` writes, opened by transformers.

Importing this registers the classes with transformers' Auto classes, so that
`AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)`
open such a folder without code of its own. The numbers are vfjax's: each branch and the splice of
its tokens are twins of `vfjax.architectures` and `vfjax.model`; towers and LLMs are transformers'.
"""

import importlib.util
import pkgutil

import transformers

from vfjax import InputError

if importlib.util.find_spec("torch") is None or tuple(
    int(part) for part in transformers.__version__.split(".")[:2]
) < (5, 24):
    raise InputError(
        "converters.hf",
        found=f"transformers {transformers.__version__}"
        + " without torch" * (importlib.util.find_spec("torch") is None),
        expected="PyTorch, and transformers 5.24, whose models are called with `cache`, or later",
        fix="pip install 'vfjax[hf]'",
    )

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from converters.hf.config import VisionFuseConfig
from converters.hf.model import VisionFuseForConditionalGeneration
from converters.hf.processor import VisionFuseProcessor

AutoConfig.register("visionfuse", VisionFuseConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForImageTextToText):  # lmms-eval asks the first for all models
    auto.register(VisionFuseConfig, VisionFuseForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VisionFuseConfig, VisionFuseProcessor, exist_ok=True)

for found in pkgutil.iter_modules(__path__):  # families and LLMs register themselves
    importlib.import_module(f"{__name__}.{found.name}")

__all__ = ["VisionFuseConfig", "VisionFuseForConditionalGeneration", "VisionFuseProcessor"]
