"""LLaVA-OneVision-1.5 (arXiv 2509.23661): Qwen2-VL's pictures, the tower RICE, a plain Qwen3.

A class token stands before the patches of each frame within the tower alone. The LLM reads visual
tokens one after another. As the authors' ds/llavaonevision1_5/modeling_llavaonevision1_5.py
computes it of one picture or frame; of several it takes the k-th one's from k - 1 patches too
early, so that they hang on what else is in the batch. Their training code
(aiak_training_llm/models/llavaov_1_5/rice_vision_model.py) does not, nor is it done here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vfjax.architectures.base import AnyArray, Media, Run, Size
from vfjax.architectures.qwen_vl import Patches, QwenVL, back
from vfjax.errors import InputError
from vfjax.vision.video import Video


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassedPatches(Patches):
    """Patches with a slot before each frame's for its class token; padding stands behind all.

    Attributes:
        kept: int32[n], the slots of the patches, in their order; n behind the last.
    """

    kept: AnyArray = dataclasses.field(kw_only=True)

    @property
    def where(self) -> dict[str, Any]:
        """What the tower is told of the patches."""
        return super().where | {"kept": jnp.asarray(self.kept)}


@dataclasses.dataclass(frozen=True)
class OneVision15(QwenVL):
    """An `Architecture`; `rate` and `budget` are not read.

    Attributes:
        films: whether videos are read: the folder's video processor makes patches of one frame.
    """

    films: bool = True

    axes: ClassVar[int] = 1

    def inputs(self, patches: Patches, sizes: Sequence[int]) -> ClassedPatches:
        """Patches moved on by the class tokens before them."""
        total, n = sum(sizes), len(patches.pixels)
        slots = np.arange(total) + np.repeat(np.arange(len(sizes)) + 1, sizes)
        pixels, place = (np.zeros_like(x) for x in (patches.pixels, patches.place))
        pixels[slots], place[slots] = patches.pixels[:total], patches.place[:total]
        frames = back([size + 1 for size in sizes], n)
        kept = np.full(n, n, np.int32)
        kept[:total] = slots
        return ClassedPatches(
            pixels, place=place, frames=frames, windows=frames, reach=patches.reach, kept=kept
        )

    def frame_size(self, video: Video) -> Size:
        """Width and height that a video's frames are resized to.

        Raises:
            InputError: the folder's video processor makes other patches than the tower reads.
        """
        if not self.films:
            raise InputError(
                "video",
                found="one, and a video processor that makes patches of several frames",
                expected="pictures: the tower's patches are of one frame",
                fix="set temporal_patch_size to 1 in video_preprocessor_config.json",
            )
        return super().frame_size(video)

    def run(self, tokens: np.ndarray, grid: tuple[int, int, int], media: Media) -> Run:
        """A picture or video in the text: mark, tokens frame by frame and row by row, mark."""
        run = super().run(tokens, grid, media)
        return Run(run.indices, marks=run.marks)
