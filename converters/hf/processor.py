"""Prompts and pictures -> what `VisionFuseForConditionalGeneration` is called with.

All is made by `vfjax.Processor` on the host; here arrays become tensors.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from converters.files.names import TOKENIZER_FILES
from converters.hf import reading
from converters.hf.config import VisionFuseConfig
from vfjax import InputError, Processor, Video, open_video
from vfjax.architectures.base import Inputs
from vfjax.errors import cut
from vfjax.model import Batch
from vfjax.rows import Picture
from vfjax.text.chat import CHAT_TEMPLATE
from vfjax.text.messages import Message, render

KEYS = ("url", "path", "base64")
"""Where else a part of a message may have its picture or video."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages of a role and content, a text or a list of parts."""


class VisionFuseProcessor(ProcessorMixin):
    """A fused model's processor.

    Attributes:
        vfjax: what makes the batches.
        config: of the model.
        folder: where its tokenizer's files are.
        tokenizer: transformers' own.
        chat_template: the folder's own; None where prompts are of a named template.
    """

    def __init__(self, own: Processor, config: VisionFuseConfig, folder: Path):
        self.vfjax, self.config, self.folder = own, config, folder
        self.tokenizer = own.tokenizer
        self.chat_template = own.chat_template or None

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that transformers would save by themselves: none."""
        return []

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: object
    ) -> Self:
        """Of a fused folder, a name on the hub, or one member's folder in any layout.

        Args:
            pretrained_model_name_or_path: the folder or name.
            kwargs: those that say how files of the hub are found are used.

        Raises:
            InputError: as `converters.load`.
        """
        name = pretrained_model_name_or_path
        folder = reading.small(name, kwargs)
        if member := reading.member(folder, name):
            return cls(member.processor, VisionFuseConfig(**member.config), member.home)
        config = VisionFuseConfig.from_pretrained(folder)
        return cls(reading.processor_of(config, folder), config, folder)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: object
    ) -> list[str]:
        """Copies the tokenizer's files; config.json too where there is none.

        Args:
            save_directory: folder.
            push_to_hub: not here: `model.push_to_hub` and the folder's files do.
            kwargs: none is used.
        """
        if push_to_hub or kwargs:
            raise InputError(
                "save_pretrained",
                found=", ".join(["push_to_hub"] * push_to_hub + sorted(kwargs)),
                expected="a folder alone",
                fix="save it, and upload the folder",
            )
        out = Path(save_directory)
        out.mkdir(parents=True, exist_ok=True)
        names = [name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        for name in names:
            if not (out / name).exists() or not os.path.samefile(self.folder / name, out / name):
                shutil.copyfile(self.folder / name, out / name)
        if not (out / "config.json").exists():
            self.config.save_pretrained(out)
        return [str(out / name) for name in names]

    @property
    def model_input_names(self) -> list[str]:
        """Arguments of the model's `forward` that are made here."""
        return ["input_ids", "attention_mask", "visual", "segments", "place", "steps", "pictures"]

    def to_dict(self) -> dict[str, Any]:
        """What tells processors apart, for printing."""
        return {"processor_class": type(self).__name__, "folder": str(self.folder)}

    def to_json_string(self) -> str:
        """See `to_dict`."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end an answer, for `generate(eos_token_id=...)`."""
        return self.vfjax.stops

    def __call__(
        self,
        images: Picture | Sequence[Picture | Sequence[Picture]] | None = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Video] | Video | None = None,
        audio: Sequence[object] | None = None,
        audios: Sequence[object] | None = None,
        *,
        padding_side: str = "left",
        padding: bool | str = True,
        truncation: bool | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """One row a text.

        Args:
            images: one picture, or those of all texts in order, or one list a text; videos
                (`vfjax.Video`) stand among them at their placeholders.
            text: prompts with an `<image>` (or the folder's image token) at each picture or video.
            videos: in place of `images`.
            audio: nothing; evaluators pass an empty list.
            audios: nothing.
            padding_side: on which short rows are filled.
            padding: rows are as long as the longest; "longest" says the same.
            truncation: whether `max_length` cuts.
            max_length: tokens of a row at most, visual ones included, if `truncation`.
            return_tensors: "pt", what there is.

        Raises:
            InputError: as `vfjax.Processor`; another `padding` or kind of tensors; images and
                videos apart, whose order in the text is not known; no text.
        """
        shown: list[object] = [
            given
            for given in (images, videos)
            if given is not None and not (isinstance(given, list | tuple) and not given)
        ]
        for where, found, ok in (
            ("padding", padding, padding in (True, False, "longest")),
            ("return_tensors", return_tensors, return_tensors in ("pt", None)),
            ("text", text, text is not None),
            ("videos", "images, too", len(shown) < 2),
            ("audio", "sounds", not audio and not audios),
        ):
            if not ok:
                raise InputError(
                    f"processor: {where}",
                    found=found,
                    expected="prompts, and pictures and videos in one list, as torch tensors of "
                    "rows as long as the longest",
                    fix="change the argument",
                )
        prompts = [text] if isinstance(text, str) else list(text or ())
        media: Any = shown[0] if shown else None
        if media is not None and not isinstance(media, list | tuple):
            media = [media]
        most = max_length if truncation else None
        return tensors(self.vfjax(media, prompts, padding=padding_side, truncate=most))

    def apply_chat_template(
        self,
        conversation: Conversation | Sequence[Conversation],
        chat_template: str | None = None,
        *,
        tools: Sequence[object] | None = None,
        documents: Sequence[object] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **variables: object,
    ) -> str | list[str] | BatchFeature | Tensor:
        """Conversations as prompts, or as what the model is called with; see transformers.

        The folder's own template is rendered as transformers does. A named template (of authors'
        layouts that have none) opens the answer after a question, whatever
        `add_generation_prompt`; it has no tools, documents and variables, and ends what was said.

        Args:
            conversation: messages, or several of these; parts are `{"type": "text", "text": ...}`,
                `{"type": "image", "image": ...}` (or "url", "path", "base64") and
                `{"type": "video", "video": ...}` (a `vfjax.Video`, frames, or "path").
            chat_template: in place of the folder's own.
            tools: see transformers.
            documents: see transformers.
            add_generation_prompt: whether an answer is to follow.
            continue_final_message: see transformers.
            tokenize: gives ids in place of texts.
            return_dict: of `tokenize`, with all that the model is called with.
            return_tensors: "pt", what there is.
            processor_kwargs: of `__call__`.
            variables: of the template; those of `__call__` are its.

        Raises:
            InputError: messages in an order that the template does not have, or parts of another
                kind; or as `__call__`.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        rows: list[Conversation] = list(conversation) if batched else [conversation]  # type: ignore[list-item, arg-type]
        names = ("padding", "padding_side", "truncation", "max_length")
        options: dict[str, Any] = {key: variables.pop(key) for key in names if key in variables}
        options |= {"return_tensors": return_tensors, **(processor_kwargs or {})}
        given = {"tools": tools, "documents": documents, **variables}
        given |= {"continue_final_message": continue_final_message or None}
        given = {key: value for key, value in given.items() if value is not None}
        own = self.vfjax
        if chat_template is not None:
            own = dataclasses.replace(own, template=CHAT_TEMPLATE, chat_template=chat_template)
        if given and own.template != CHAT_TEMPLATE:
            raise InputError(
                "apply_chat_template",
                found=", ".join(given),
                expected=f"none of it: template {own.template!r} has no variables",
                fix="leave it out, or name a chat_template",
            )
        prompts, pictures = list[str](), list[list[Picture]]()
        for row in rows:
            said = [_message(each) for each in row]
            open_end = own.template != CHAT_TEMPLATE and bool(said) and said[-1].role == "user"
            prompt, found = render(own, said, given, answer=add_generation_prompt or open_end)
            shown: list[Any] = list(found)
            prompts.append(prompt)
            pictures.append([_opened(each) for each in shown] if tokenize else [])
        if not tokenize:
            return prompts if batched else prompts[0]
        made = self(pictures, prompts, **options)
        return made if return_dict else made["input_ids"]


def _message(given: Mapping[str, Any]) -> Message:
    """A message as transformers takes it; its pictures are parts that `_opened` reads.

    Raises:
        InputError: a part of another kind.
    """
    content = given.get("content", "")
    parts: list[Any] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "video"):
            raise InputError(
                "apply_chat_template: content",
                found=cut(repr(part)),
                expected="parts of type 'text', 'image' or 'video'",
                fix="change the message",
            )
        parts.append(str(part.get("text", "")) if kind == "text" else part)
    more = {key: value for key, value in given.items() if key not in ("role", "content")}
    return Message(str(given.get("role", "")), tuple(parts), more)


def _opened(part: Mapping[str, Any]) -> Picture:
    """A picture or video of a part; what it is found by is under "image", "url", "path" or so."""
    found = next((part[key] for key in (part["type"], *KEYS) if part.get(key) is not None), None)
    if found is None:
        raise InputError(
            f"apply_chat_template: {part['type']}",
            found="none",
            expected=f"it under {part['type']!r}, or one of {', '.join(KEYS)}",
            fix="add it to the part",
        )
    if part["type"] == "image":
        return load_image(found) if isinstance(found, str) else found
    if isinstance(found, Video):
        return found
    if isinstance(found, str | os.PathLike):
        return open_video(found)
    return Video(tuple(x if isinstance(x, Image.Image) else Image.fromarray(x) for x in found))


def tensors(batch: Batch) -> BatchFeature:
    """The arguments of `forward` for a batch; columns that only pad are left out."""
    read = np.flatnonzero(np.asarray(batch.mask).any(axis=0))
    used = slice(read[0], read[-1] + 1)
    fields = {
        "input_ids": batch.tokens,
        "attention_mask": batch.mask,
        "visual": batch.visual,
        "segments": batch.segments,
        "labels": batch.labels,
        "place": batch.place,
        "steps": batch.steps,
    }
    found: dict[str, Any] = {
        key: torch.from_numpy(np.array(x)[:, used]).long()
        for key, x in fields.items()
        if x is not None
    }
    pictures = {}
    for name, seen in batch.images.items():
        assert isinstance(seen.given, Inputs)
        own = _flat(vars(seen.given))
        if seen.gather is not None:
            own |= {f"gather.{key}": x for key, x in _flat(vars(seen.gather)).items()}
        if seen.prompt is not None:
            own |= {f"prompt.{key}": x for key, x in _flat(vars(seen.prompt)).items()}
        pictures[name] = own
    return BatchFeature({**found, "pictures": pictures})


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their names, of a mapping by both; arrays as tensors, without what is None."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": x for name, x in _flat(value).items()}
        elif value is not None:
            found[key] = _tensor(value) if hasattr(value, "dtype") else value
    return found


def _tensor(array: np.ndarray) -> Tensor:
    made = torch.from_numpy(np.array(array))
    return made.long() if made.dtype in (torch.int32, torch.int16, torch.int8) else made
