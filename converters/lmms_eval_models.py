"""vfjax as a model of lmms-eval (the extra "lmms-eval"), tried with 0.7.3.

    python -m lmms_eval --model vfjax --model_args pretrained=DIR,dtype=float32 \
        --batch_size 8 --tasks NAME

What requests hold is said in `lmms_eval.api.model` and `lmms_eval.api.task`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

import converters
from vfjax import InputError, Sampling, generate_ids, open_video
from vfjax.errors import counted
from vfjax.processor import Picture
from vfjax.text import chat
from vfjax.text.messages import Message, tokenize
from vfjax.text.prompts import IMAGE_TOKEN
from vfjax.text.stream import Text

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SETTINGS = {"max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until", "seed"}
Row = tuple[list[int], list[Picture]]
"""Token ids with -200 at each picture, and the pictures."""


class Content(Protocol):
    """Of a message, `lmms_eval.protocol`: a text has `text`, a picture or video `url`."""

    type: str
    text: str
    url: Any  # a video's is its path


class Simple(lmms):
    """A question is a text, and pictures that come before it (`--force_simple`)."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        batch_size: int | str = 1,
        template: str | None = None,
        max_images: int | None = None,
        frames: int = 8,
        pool: int = 2,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: object,
    ):
        """Loads the model.

        Args:
            pretrained: any folder that `converters.load` takes.
            dtype: of the parameters; None keeps the stored ones.
            batch_size: rows that run together.
            template: of the prompts; None takes the checkpoint's.
            max_images: of a question; more are an error.
            frames: taken from a video.
            pool: visual tokens of a frame that become one.
            device: not used, JAX has its own.
            max_batch_size: not used.
            unknown: refused.

        Raises:
            InputError: an unknown argument, a `batch_size` that is no number, or as
                `converters.load`.
        """
        del device, max_batch_size
        super().__init__()
        if unknown:
            known = "pretrained, dtype, template, max_images, frames, pool"
            _refuse("model_args", ", ".join(unknown), known)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            _refuse("batch_size", batch_size, "a number of rows")
        self.batch_size = int(batch_size)
        self.model, self.processor = converters.load(pretrained, dtype=dtype)
        if template is not None:
            self.processor.template = chat.known(template)
        self.max_images, self.frames, self.pool = max_images, frames, pool

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, each cut where the context ends.

        Rows of a batch may have settings of their own. Long questions come first, so that those
        of a batch are of about one length.

        Raises:
            InputError: a question that the model can't take, or beams.
        """
        other = {key for request in requests for key in self._given(request)} - SETTINGS
        if other:
            logger.warning(f"vfjax has no use for {', '.join(sorted(other))}")
        order = sorted(range(len(requests)), key=lambda i: -len(str(requests[i].args[0])))
        out: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), desc="vfjax", disable=self.rank != 0) as progress:
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                found = self._generate([requests[i] for i in some])
                out |= dict(zip(some, found, strict=True))
                progress.update(len(some))
        return [out[i] for i in range(len(requests))]

    def _generate(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        rows = [self.row(request) for request in requests]
        settings = [_settings(self._given(request)) for request in requests]
        batch = self.processor(
            [pictures for _, pictures in rows], input_ids=[ids for ids, _ in rows]
        )
        lengths = batch.mask.sum(axis=1).tolist()
        room = [max(self.model.context - length, 1) for length in lengths]
        ids = generate_ids(
            self.model,
            batch,
            max_new_tokens=[min(s.max_new_tokens, n) for s, n in zip(settings, room, strict=True)],
            stop=self.processor.stops,
            sampling=Sampling.stack([s.sampling for s in settings]),
            settings=self.processor.settings,
        )
        out = []
        for new, length, setting in zip(ids, lengths, settings, strict=True):
            text = Text(self.processor, setting.until)
            text.add(new, last=True)
            counts = TokenCounts(input_tokens=length, output_tokens=len(new))
            out.append(GenerationResult(text.text, counts))
        return out

    def _given(self, request: Instance) -> Mapping[str, Any]:
        """The generation_kwargs."""
        return request.args[1]

    def row(self, request: Instance) -> Row:
        """As upstream LLaVA's plug-in: `<image>` in the text says where the pictures stand."""
        text, _, doc_to_visual, doc_id, task, split = request.args
        visuals = [
            self._picture(v) for v in doc_to_visual(self.task_dict[task][split][doc_id]) or ()
        ]
        self._count(visuals)
        if visuals and text.count(IMAGE_TOKEN) == len(visuals):
            return self.processor.tokenize(self.processor.render([(text, None)])), visuals
        return tokenize(self.processor, [Message("user", (*visuals, text))])

    def _picture(self, visual: Picture) -> Picture:
        if isinstance(visual, str) and not visual.lower().endswith(PICTURES):
            return open_video(visual, frames=self.frames, pool=self.pool)
        return visual

    def _count(self, visuals: Sequence[Picture]) -> None:
        if self.max_images is not None and len(visuals) > self.max_images:
            _refuse("max_images", counted(len(visuals), "picture"), f"at most {self.max_images}")

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Raises InputError: lmms-eval 0.7.3 breaks on what its own interface says to return."""
        _refuse("loglikelihood", "a task that needs it", "one of output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        """Raises InputError: there are no rounds here."""
        _refuse("generate_until_multi_round", "a task that needs it", "one of one round")


class Chat(Simple):
    """A question is a conversation, as the task's doc_to_messages says; the default."""

    is_simple = False

    def _given(self, request: Instance) -> Mapping[str, Any]:
        return request.args[2]

    def row(self, request: Instance) -> Row:
        _, doc_to_messages, _, doc_id, task, split = request.args
        said = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        messages = [
            Message(message.role, tuple(map(self._part, message.content)))
            for message in said.messages
        ]
        ids, pictures = tokenize(self.processor, messages)
        self._count(pictures)
        return ids, pictures

    def _part(self, part: Content) -> Picture:
        if part.type == "text":
            return part.text
        if part.type == "image":
            return part.url
        if part.type == "video":
            return open_video(part.url, frames=self.frames, pool=self.pool)
        _refuse("messages", f"a part of type {part.type!r}", "text, image or video")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A request's: arguments of `generate_ids`, and texts that end its answer."""

    max_new_tokens: int
    sampling: Sampling
    until: list[str]


def _settings(given: Mapping[str, Any]) -> Settings:
    """From its generation_kwargs."""
    if given.get("num_beams", 1) not in (None, 1):
        _refuse("num_beams", given["num_beams"], "1")
    temperature = given.get("temperature") or 0.0
    until = given.get("until") or ()
    return Settings(
        given.get("max_new_tokens") or 1024,
        Sampling(
            temperature=temperature if given.get("do_sample", True) else 0.0,
            top_p=given.get("top_p") or 1.0,
            seed=given.get("seed") or 0,
        ),
        [until] if isinstance(until, str) else [text for text in until if text],
    )


def _refuse(where: str, found: object, expected: str) -> NoReturn:
    raise InputError(f"lmms-eval: {where}", found=found, expected=expected, fix="change the call")
