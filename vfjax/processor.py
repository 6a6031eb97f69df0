"""Pictures and prompts -> a `Batch` of static shape, on the host."""

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vfjax.architectures.base import Media, Pictures, Prompt, bucket
from vfjax.errors import InputError, counted
from vfjax.fusion.prune import Groups, marks
from vfjax.model import Batch, ModelConfig
from vfjax.settings import Settings
from vfjax.text import chat as own
from vfjax.text import prompts as text
from vfjax.text.slots import Shard, Slots, laid, no_room, splice
from vfjax.vision.images import Convert, File, open_file, open_image
from vfjax.vision.video import Video

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray | File | Video

LENGTHS = tuple(m << k for k in range(4, 17) for m in (4, 5, 6, 7))
"""Default sequence lengths: 64, 80, 96, 112, 128, ... each at most 1.25 x the one before."""


@dataclasses.dataclass
class Processor:
    """Makes batches for one model.

    Attributes:
        config: the model's config.
        tokenizer: a transformers tokenizer; None takes `input_ids` only.
        template: name of the prompt template (`vfjax.text.prompts.TEMPLATES`), or "chat_template",
            the folder's own.
        stop_ids: token ids that end an answer, whatever the template.
        lengths: sequence lengths that batches are padded to; one compilation each.
        chat_template: the folder's own, Jinja; "" if it has none.
        image_token: what stands for a picture in prompts that are tokenised whole, as transformers'
            processors do; "": text around each `<image>` is tokenised by itself, as authors do.
        settings: of generation, by the folder.
    """

    config: ModelConfig
    tokenizer: Any = None
    template: str = "vicuna_v1"
    stop_ids: tuple[int, ...] = ()
    lengths: tuple[int, ...] = LENGTHS
    chat_template: str = ""
    image_token: str = ""
    settings: Settings = Settings()

    def chat(self, question: str, *, images: int | None = None) -> str:
        """A prompt for one question about `images` pictures, answer open.

        By default about one, for an LLM without visual branches about none.
        """
        if images is None:
            images = min(len(self.config.branches), 1)
        if self.template == own.CHAT_TEMPLATE:
            parts = [own.PICTURE] * images + [own.words(question)]
            return self.render_messages([{"role": "user", "content": parts}])
        return self.render([((text.IMAGE_TOKEN + "\n") * images + question, None)])

    def render(self, turns: Sequence[text.Turn]) -> str:
        """A conversation in the template; arguments and errors as of `prompts.render`."""
        if self.template == own.CHAT_TEMPLATE:
            return self.render_messages(own.from_turns(turns), answer=turns[-1][1] is None)
        return text.render(text.get_template(self.template), turns)

    def render_messages(
        self,
        messages: own.Messages,
        *,
        answer: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages in the folder's own chat template; errors as of `vfjax.text.chat.render`."""
        if not self.chat_template:
            raise InputError(
                "template",
                found=f"{own.CHAT_TEMPLATE!r}, and no chat template in the folder",
                expected=f"one of {', '.join(text.TEMPLATES)}",
                fix="name one, or add chat_template.jinja",
            )
        token = self.image_token or text.IMAGE_TOKEN
        tokenizer = self.require_tokenizer()
        return own.render(
            tokenizer,
            self.chat_template,
            messages,
            token,
            answer=answer,
            variables=variables or {},
        )

    def tokenize(self, prompt: str) -> list[int]:
        """Ids of a prompt, -200 at each picture; see `vfjax.text.prompts.encoded`.

        Raises:
            InputError: there is no tokenizer.
        """
        return text.encoded(self.require_tokenizer(), prompt, self.image_token)

    def labels(self, turns: Sequence[text.Turn]) -> tuple[list[int], list[int]]:
        """Training ids and labels of a conversation; see `prompts.labels`, `chat.labels`."""
        if self.template == own.CHAT_TEMPLATE:
            return own.labels(self, turns)
        template = text.get_template(self.template)
        return text.labels(self.require_tokenizer(), template, turns, self.image_token)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The template's stop strings; the folder's own has none but its stop tokens."""
        return () if self.template == own.CHAT_TEMPLATE else text.get_template(self.template).stop

    @property
    def converts(self) -> tuple[Convert, ...]:
        """How the branches convert pictures to RGB, each way once."""
        return tuple(
            dict.fromkeys(branch.architecture.images.convert for branch in self.config.branches)
        )

    def open(self, source: str | os.PathLike | bytes, *, name: str | None = None) -> File:
        """A picture of a file or of its bytes, read as all branches read it.

        Args:
            source: path or bytes.
            name: what to call it in errors; by default its path.

        Raises:
            InputError: as `vfjax.vision.images.open_image`.
        """
        file = open_file(source, name=name)
        for convert in self.converts:
            file.rgb(convert)
        return file

    @property
    def stops(self) -> tuple[int, ...]:
        """`stop_ids`, and the ids of the template's stops that are tokens of their own."""
        known = {} if self.tokenizer is None else self.tokenizer.added_tokens_encoder
        own = {known[stop] for stop in self.stop_texts if stop in known}
        return tuple(sorted({*self.stop_ids, *own}))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of new token ids, cut at the first of `stops` and at the template's stop strings.

        Raises:
            InputError: there is no tokenizer.
        """
        stops = set(self.stops)
        kept = list(itertools.takewhile(lambda i: int(i) not in stops, ids))
        out = self.require_tokenizer().decode(kept, skip_special_tokens=True)
        for stop in self.stop_texts:
            out = out.split(stop)[0]
        return out.strip()

    def __call__(
        self,
        images: Sequence[Picture | Sequence[Picture]] | None = None,
        prompts: Sequence[str] | None = None,
        *,
        input_ids: Sequence[Sequence[int]] | None = None,
        labels: Sequence[Sequence[int]] | None = None,
        padding: str = "right",
        truncate: int | None = None,
        shard: Shard | None = None,
    ) -> Batch:
        """One row a prompt.

        Args:
            images: pictures, or videos (`vfjax.open_video`), in the order of the placeholders over
                the whole batch; or, if any item is a list, one list a row.
            prompts: texts with an `<image>` (or `image_token`) at each picture; see `chat`.
            input_ids: in place of prompts, ids with -200 at each picture.
            labels: ids to learn, as long as each row's ids (-100 where there is none).
            padding: side on which short rows are filled, "right" or "left".
            truncate: cut rows to this many tokens, visual ones included, as upstream does at its
                tokenizer_model_max_length; a long picture then cuts the question.
            shard: the rows are this share of a batch; visual tokens are numbered in the whole.

        Returns:
            A batch of numpy arrays, t and n rounded up to a bucket, or as `shard` says.

        Raises:
            InputError: placeholders and pictures don't match, a row is longer than the LLM's
                context, an id outside the vocabulary, a picture can't be read, or there is more
                than `shard` has room for.
        """
        rows = self._rows(prompts, input_ids)
        pictures = self._pictures(images, rows)
        words = [ids[:truncate] for ids in _words(rows)]
        counts = [int((row == text.IMAGE_ID).sum()) for row in rows]
        images_in, parts, sizes = self._prepare(pictures, counts, words, shard)
        seen = [Slots.join(branches) for branches in parts]
        spliced, owned, first = [], [], 0
        for row, count in zip(rows, counts, strict=True):
            here = slice(first, first + count)
            slots, source = splice(row, seen[here])
            spliced.append((slots[:truncate], source[:truncate]))
            owned.append(parts[here])
            first += count
        longest = max(len(slots) for slots, _ in spliced)
        t = self._length(longest) if shard is None else shard.length
        if longest > t:
            raise no_room("tokens in a row", longest, t)
        shape = (len(rows), t)
        tokens, visual = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        mask, segments = np.zeros(shape, bool), np.zeros(shape, np.int32)
        learn = np.full(shape, text.IGNORE, np.int32)
        placed = any(branch.architecture.axes > 1 for branch in self.config.branches)
        place, steps = np.zeros((*shape, 3), np.int32), np.ones(shape, np.int32)
        for i, (slots, source) in enumerate(spliced):
            at = slice(t - len(slots), t) if padding == "left" else slice(0, len(slots))
            tokens[i, at], visual[i, at], mask[i, at] = slots.ids, slots.visual, True
            segments[i, at], place[i, at], steps[i, at] = slots.segments, slots.place, slots.steps
            if labels is not None:
                wanted = _labels(labels, i, rows)[source]
                learn[i, at] = np.where(slots.segments == 0, wanted, text.IGNORE)
        return Batch(
            tokens=tokens,
            visual=visual,
            mask=mask,
            segments=segments,
            images=images_in,
            labels=None if labels is None else learn,
            groups=self._groups(owned, visual, mask) if images_in else None,
            sizes=sizes,
            place=place if placed else None,
            steps=steps if placed else None,
        )

    def _groups(
        self, parts: Sequence[Sequence[Sequence[Slots]]], visual: np.ndarray, mask: np.ndarray
    ) -> Groups | None:
        """What `Prune` needs to know; None where all visual tokens stay.

        Args:
            parts: of each row each picture's tokens by branch.
            visual: of the batch.
            mask: of the batch.
        """
        prune = self.config.prune
        shares = () if prune is None else prune.shares(len(self.config.branches))
        if all(share == 1 for share in shares):
            return None
        of, most = np.full(visual.shape, -1, np.int32), np.zeros(visual.shape, np.int32)
        stay = (mask & (visual < 0)).sum(axis=1)
        for i, pictures in enumerate(parts):
            places = np.flatnonzero(visual[i] >= 0)
            numbers = [[s.visual[s.visual >= 0] for s in branches] for branches in pictures]
            marked = marks(numbers, shares)[:, : len(places)]
            of[i, places], most[i, places] = marked
            sizes = np.bincount(marked[0])
            stay[i] += sum(min(k, sizes[g]) for g, k in dict(marked.T.tolist()).items())
        return Groups(of, most, self._length(int(stay.max())))

    def shard(
        self,
        input_ids: Sequence[Sequence[int]],
        index: int,
        count: int,
        *,
        truncate: int | None = None,
        multiple: int = 1,
    ) -> Shard:
        """What the processes have to agree on, from what all know: the ids of the whole batch.

        Pictures, which each process reads of its own rows only, count with the most tokens they
        may have.

        Args:
            input_ids: of all rows of the batch, in order; process i has the i-th of `count` equal
                parts.
            index: of this process.
            count: of the processes.
            truncate: cut rows to this many tokens, visual ones included.
            multiple: of pictures that a process makes room for, if any row has one: as many as it
                has groups of devices that share rows.

        Raises:
            InputError: the rows don't divide, or one is longer than the LLM's context.
        """
        rows = self._rows(None, input_ids)
        if len(rows) % count:
            raise InputError(
                "batch",
                found=counted(len(rows), "row"),
                expected=f"a multiple of {count}, the number of processes",
                fix="choose another batch size",
            )
        places = np.array([(row == text.IMAGE_ID).sum() for row in rows])
        each = sum(branch.tokens for branch in self.config.branches)
        lengths = [len(r) + n * (each - 1) for r, n in zip(rows, places, strict=True)]
        most = int(places.reshape(count, -1).sum(axis=1).max())
        return Shard(
            index=index,
            count=count,
            length=self._length(min(max(lengths), truncate or max(lengths))),
            pictures=-(-bucket(most) // multiple) * multiple if most else 0,
            text=self._length(max((len(w[:truncate]) for w in _words(rows)), default=1)),
        )

    def _rows(
        self, prompts: Sequence[str] | None, input_ids: Sequence[Sequence[int]] | None
    ) -> list[np.ndarray]:
        if isinstance(prompts, str):
            raise InputError(
                "prompts", found="one str", expected="a list of prompts", fix="pass [prompt]"
            )
        if (prompts is None) == (input_ids is None) or not (prompts or input_ids):
            raise InputError(
                "processor",
                found="both or neither" if (prompts is None) == (input_ids is None) else "no row",
                expected="prompts or input_ids, at least one row",
                fix="pass one of the two",
            )
        if prompts is not None:
            input_ids = [self.tokenize(prompt) for prompt in prompts]
        assert input_ids is not None
        rows = [np.asarray(row, np.int64) for row in input_ids]
        for i, row in enumerate(rows):
            bad = row[(row != text.IMAGE_ID) & ((row < 0) | (row >= self.config.llm.vocab))]
            if bad.size or not row.size:
                raise InputError(
                    f"row {i}",
                    found=f"token id {bad[0]}" if bad.size else "no token",
                    expected=f"ids below {self.config.llm.vocab}, {text.IMAGE_ID} for a picture",
                    fix="use the checkpoint's own tokenizer",
                )
        return rows

    def _pictures(
        self, images: Sequence[Picture | Sequence[Picture]] | None, rows: Sequence[np.ndarray]
    ) -> list[Picture]:
        """All pictures in prompt order; their number must match the placeholders."""
        places = [int((row == text.IMAGE_ID).sum()) for row in rows]
        bare = (str, os.PathLike, bytes, Image.Image, File, Video)
        if isinstance(images, bare) or getattr(images, "ndim", 0) in (2, 3):
            raise InputError(
                "images",
                found=f"one {type(images).__name__}",
                expected="a list of pictures",
                fix="pass [picture]",
            )
        images = [] if images is None else list(images)
        if any(isinstance(image, (list, tuple)) for image in images):
            if len(images) != len(rows):
                raise InputError(
                    "images",
                    found=counted(len(images), "list"),
                    expected=f"one list a row, {counted(len(rows), 'row')}",
                    fix="pass an empty list where a row has no picture",
                )
            lists = [list(i) if isinstance(i, (list, tuple)) else [i] for i in images]
            where = [f"row {i}" for i in range(len(rows))]
        else:
            lists, places, where = [images], [sum(places)], ["the batch"]
        for name, found, expected in zip(where, lists, places, strict=True):
            if len(found) != expected:
                raise InputError(
                    name,
                    found=f"{counted(len(found), 'picture')} for "
                    + counted(expected, f"{text.IMAGE_TOKEN} placeholder"),
                    expected="as many of one as of the other",
                    fix=f"put one {text.IMAGE_TOKEN} into the prompt at each picture",
                )
        pictures = [picture for group in lists for picture in group]
        if pictures and not self.config.branches:
            raise InputError(
                "images",
                found=counted(len(pictures), "picture"),
                expected="none: this model is a plain LLM without a visual branch",
                fix="load a multimodal checkpoint",
            )
        return pictures  # type: ignore[return-value]

    def _length(self, longest: int) -> int:
        context = self.config.llm.context
        if longest > context:
            raise InputError(
                "prompt",
                found=f"{longest} tokens, visual ones included",
                expected=f"at most {context}, the LLM's context",
                fix="shorten the prompt or pass fewer pictures",
            )
        return _bucket(longest, (*self.lengths, context))

    def _prepare(
        self,
        pictures: Sequence[Picture],
        counts: Sequence[int],
        words: Sequence[np.ndarray],
        shard: Shard | None,
    ) -> tuple[dict[str, Pictures], list[list[Slots]], tuple[int, ...]]:
        """Each branch's inputs; each picture's tokens by branch; and visual tokens of the branches.

        Args:
            pictures: of all rows.
            counts: of each row's.
            words: for each picture the text ids of its row.
            shard: see `__call__`.
        """
        slots = shard.pictures if shard else None
        if not (pictures or slots):
            return {}, [], ()
        owner = [i for i, p in enumerate(pictures) for _ in range(_frames(p))]
        videos = any(isinstance(p, Video) for p in pictures)
        if slots is not None and (videos or len(owner) > slots):
            raise no_room("pictures", len(owner), slots)
        shown = {convert: _rows(pictures, counts, convert) for convert in self.converts}
        parts: list[list[Slots]] = [[] for _ in pictures]
        inputs: dict[str, Pictures] = {}
        sizes: list[int] = []
        for number, branch in enumerate(self.config.branches):
            path = branch.architecture
            ready = path.prepare(shown[path.images.convert], slots)
            tokens, gather, size = laid(ready, sum(sizes), number, shard)
            prompt = self._texts([words[i] for i in owner], shard) if path.reads_text else None
            inputs[branch.name] = Pictures(ready.inputs, gather, prompt)
            for mine, more in zip(parts, tokens, strict=True):
                mine.append(more)
            sizes.append(size)
        return inputs, parts, tuple(sizes)

    def _texts(self, words: Sequence[np.ndarray], shard: Shard | None) -> Prompt:
        """For each picture or frame the ids of its prompt."""
        n = shard.pictures if shard else bucket(len(words))
        ids = np.zeros((n, shard.text if shard else self._length(max(map(len, words)))), np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, row in enumerate(words):
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return Prompt(ids, mask)

    def require_tokenizer(self) -> Any:
        """The tokenizer; raises InputError if there is none."""
        if self.tokenizer is None:
            raise InputError(
                "tokenizer",
                found="none in the checkpoint folder",
                expected="tokenizer.json, or tokenizer.model and tokenizer_config.json",
                fix="add the files, or pass input_ids in place of prompts",
            )
        return self.tokenizer


def _frames(picture: Picture) -> int:
    """Pictures that are shown of one, or of a video."""
    return len(picture.frames) if isinstance(picture, Video) else 1


def _rows(
    pictures: Sequence[Picture], counts: Sequence[int], convert: Convert
) -> list[list[Media]]:
    """Each row's pictures, RGB, and videos."""
    rest = (p if isinstance(p, Video) else open_image(p, convert=convert) for p in pictures)
    return [list(itertools.islice(rest, count)) for count in counts]


def _words(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each picture the text ids of its row."""
    return [
        row[row != text.IMAGE_ID] for row in rows for _ in range(int((row == text.IMAGE_ID).sum()))
    ]


def _labels(labels: Sequence[Sequence[int]], i: int, rows: Sequence[np.ndarray]) -> np.ndarray:
    if len(labels) != len(rows) or len(labels[i]) != len(rows[i]):
        raise InputError(
            f"labels of row {i}",
            found=counted(len(labels), "row")
            if len(labels) != len(rows)
            else counted(len(labels[i]), "label"),
            expected=f"{counted(len(rows), 'row')}, {counted(len(rows[i]), 'label')} in this one, "
            "one an id",
            fix="label every id, -100 where there is nothing to learn",
        )
    return np.asarray(labels[i], np.int32)


def _bucket(size: int, sizes: Sequence[int]) -> int:
    """The smallest bucket that holds `size`."""
    return min(s for s in sizes if s >= size)
