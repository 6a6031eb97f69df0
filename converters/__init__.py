"""PyTorch and Hugging Face checkpoints <-> vfjax models.

Read a folder: Hugging Face's or their authors' LLaVA-like models, fused folders, causal LMs; LoRA
adapters and projectors with `base=`. Write it back, in the layout it came in:

    model, processor = converters.load("path/to/llava-1.5")
    converters.export(model, "path/to/new-folder")

In another layout, transformers' or that of LLaVA's authors, from the folder itself:

    converters.export("path/to/llava-1.5", "path/to/llava-1.5-hf", layout="hf")

Fuse members of one family, into a folder or with nothing written between; first say what would be:

    members = {"a": "path/to/member-a", "b": "path/to/member-b"}
    plan = converters.dry_run(members, "path/to/fused", base="path/to/base-llm")
    converters.fuse(members, "path/to/fused", base="path/to/base-llm", method="ties")
    model, processor = converters.load_fused(members, base="path/to/base-llm")

Merge members of one architecture whole, towers and connectors too, into a folder like theirs:

    converters.fuse(members, "path/to/merged", method="linear", export="whole")

Make a new model, whose connector is yet to be trained:

    model, processor = converters.create("path/to/llm", "path/to/clip", {"kind": "mlp"})

Look at parts: a vision encoder alone, or what a folder holds, from its headers (a `Source`):

    encoder = converters.load_encoder("path/to/clip")
    source = converters.open_source("path/to/llava-1.5")
    print(source.layout, source.llm["model_type"], [branch.name for branch in source.branches])

On the command line: `python -m converters inspect|verify|export`. `help(converters.load)` and the
like say all about one name.
"""
# ruff: noqa: E402, F401  (readers need what is registered; without `__all__` help() is short)

from converters import gguf, source
from converters.folder import open_source
from converters.source import Source

source.register()

from converters.combine import load_fused
from converters.create import create
from converters.export import export
from converters.fuse import dry_run, fuse
from converters.load import load, load_encoder
