"""PyTorch and Hugging Face checkpoints <-> vfjax models."""

from converters import registry, source
from converters.folder import open_source
from converters.source import Source

for _module in registry.modules():
    registry.register(_module)
    source.register(getattr(_module, "LAYOUTS", ()))

from converters.combine import load_fused  # noqa: E402  (the registry must be there first)
from converters.create import create  # noqa: E402
from converters.export import export  # noqa: E402
from converters.fuse import dry_run, fuse  # noqa: E402
from converters.load import load, load_encoder  # noqa: E402

__all__ = [
    "Source",
    "create",
    "dry_run",
    "export",
    "fuse",
    "load",
    "load_encoder",
    "load_fused",
    "open_source",
]
