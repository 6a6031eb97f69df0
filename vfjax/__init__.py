"""vfjax: several multimodal LLMs fused into one, without training, in JAX."""

from vfjax.errors import InputError
from vfjax.fusion.modes import CacheFusion, LogitsFusion, MemberProcessors
from vfjax.fusion.prune import Prune
from vfjax.generate import generate, generate_ids, stream_ids
from vfjax.model import Batch, Model, encode, forward
from vfjax.processor import Processor
from vfjax.sampling import Sampling
from vfjax.settings import Settings
from vfjax.text.stream import stream
from vfjax.vision.video import Video, open_video

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CacheFusion",
    "InputError",
    "LogitsFusion",
    "MemberProcessors",
    "Model",
    "Processor",
    "Prune",
    "Sampling",
    "Settings",
    "Video",
    "encode",
    "forward",
    "generate",
    "generate_ids",
    "open_video",
    "stream",
    "stream_ids",
]
