"""Members' visual paths, one file a family; the contract is `vfjax.architectures.base`.

A connector's config is a frozen dataclass (`vfjax.architectures.base.Connector`); what it builds
makes visual tokens of hidden states and names its stages.
"""

from vfjax.architectures.base import (
    Architecture,
    Branch,
    Encoded,
    Gather,
    Inputs,
    Media,
    Pictures,
    Prepared,
    Prompt,
    Rows,
    Run,
    VisualTokens,
)
from vfjax.architectures.cambrian import Cambrian, SVAConfig, TowerConfig
from vfjax.architectures.combine import Combine
from vfjax.architectures.comm import Comm, COMMConfig, MergeConfig
from vfjax.architectures.dense_connector import dense
from vfjax.architectures.idefics import Film, Idefics, Marks
from vfjax.architectures.internvl import InternVL
from vfjax.architectures.llava import Llava, ProjectorConfig
from vfjax.architectures.llava_next import LlavaNext
from vfjax.architectures.mini_gemini import MiniGemini, MiningConfig
from vfjax.architectures.mlp import MLPConfig
from vfjax.architectures.onevision import OneVision
from vfjax.architectures.onevision15 import OneVision15
from vfjax.architectures.ovis2 import Ovis2, VocabularyConfig
from vfjax.architectures.pixel_shuffle import PixelShuffleConfig
from vfjax.architectures.qwen3_vl import DeepMergersConfig, Frames, Qwen3VL
from vfjax.architectures.qwen_vl import MergerConfig, QwenVL
from vfjax.architectures.slime import Slime, SliMEConfig
from vfjax.architectures.tapped import Tapped

__all__ = [
    "Architecture",
    "Branch",
    "COMMConfig",
    "Cambrian",
    "Combine",
    "Comm",
    "DeepMergersConfig",
    "Encoded",
    "Film",
    "Frames",
    "Gather",
    "Idefics",
    "Inputs",
    "InternVL",
    "Llava",
    "LlavaNext",
    "MLPConfig",
    "Marks",
    "Media",
    "MergeConfig",
    "MergerConfig",
    "MiniGemini",
    "MiningConfig",
    "OneVision",
    "OneVision15",
    "Ovis2",
    "Pictures",
    "PixelShuffleConfig",
    "Prepared",
    "ProjectorConfig",
    "Prompt",
    "Qwen3VL",
    "QwenVL",
    "Rows",
    "Run",
    "SVAConfig",
    "SliMEConfig",
    "Slime",
    "Tapped",
    "TowerConfig",
    "VisualTokens",
    "VocabularyConfig",
    "dense",
]
