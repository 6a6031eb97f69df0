"""Pictures and prompts -> a `Batch` of static shape, on the host."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np

from vfjax.architectures.base import Pictures, bucket
from vfjax.errors import InputError
from vfjax.fusion.prune import group
from vfjax.fusion.shard import Shard, agree, no_room
from vfjax.fusion.splice import Slots, expand, layout, pad
from vfjax.model import Batch, ModelConfig
from vfjax.rows import (
    Picture,
    bucket_length,
    check_labels,
    frames,
    open_media,
    pad_texts,
    placeholders,
    read_ids,
    read_pictures,
    texts,
)
from vfjax.settings import Settings
from vfjax.text import chat as own
from vfjax.text import labels as training
from vfjax.text import prompts as text
from vfjax.text.tokenizer import Tokenizer
from vfjax.vision.images import Convert, File, open_file
from vfjax.vision.video import Video

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
        lengths: sequence lengths that batches are padded to, rows longer than all of them to the
            LLM's whole context; one compilation each.
        chat_template: the folder's own, Jinja; "" if it has none.
        image_token: what stands for a picture in prompts that are tokenised whole, as transformers'
            processors do; "": text around each `<image>` is tokenised by itself, as authors do.
        settings: of generation, by the folder.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None = None
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
        variables: Mapping[str, object] | None = None,
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
            tokenizer, self.chat_template, messages, token, answer=answer, variables=variables or {}
        )

    def tokenize(self, prompt: str) -> list[int]:
        """Ids of a prompt, -200 at each picture; see `vfjax.text.prompts.encoded`.

        Raises:
            InputError: there is no tokenizer.
        """
        return text.encoded(self.require_tokenizer(), prompt, self.image_token)

    def labels(self, turns: Sequence[text.Turn]) -> tuple[list[int], list[int]]:
        """Training ids and labels of a conversation; see `vfjax.text.labels`, `chat.labels`."""
        if self.template == own.CHAT_TEMPLATE:
            return own.labels(self, turns)
        template = text.get_template(self.template)
        return training.labels(self.require_tokenizer(), template, turns, self.image_token)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The template's stop strings; the folder's own has none but its stop tokens."""
        return () if self.template == own.CHAT_TEMPLATE else text.get_template(self.template).stop

    @property
    def converts(self) -> tuple[Convert, ...]:
        """How the branches convert pictures to RGB, each way once."""
        ways = (branch.architecture.images.convert for branch in self.config.branches)
        return tuple(dict.fromkeys(ways))

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
        rows = self._ids(prompts, input_ids)
        pictures = read_pictures(images, rows, len(self.config.branches))
        counts = [placeholders(row) for row in rows]
        words = [ids[:truncate] for ids in texts(rows)]
        alone = prompts is not None and len(self.config.branches) == 1
        images_in, parts, sizes, around = self._prepare(pictures, counts, words, shard, alone)
        if prompts is not None and any(first or last for first, last in around):
            token = self.image_token or text.IMAGE_TOKEN
            rows = self._ids(text.surround(prompts, around, token), None)
        rest = iter(parts)
        owned = [list(itertools.islice(rest, count)) for count in counts]
        expanded = [expand(row, seen) for row, seen in zip(rows, owned, strict=True)]
        cut = [slots[:truncate] for slots, _ in expanded]
        longest = max(map(len, cut))
        t = self._length(longest) if shard is None else shard.length
        if longest > t:
            raise no_room("tokens in a row", longest, t)
        slots, mask = pad(cut, t, padding)
        learn = None
        if labels is not None:
            given = check_labels(labels, rows)
            wanted = [ids[at][:truncate] for ids, (_, at) in zip(given, expanded, strict=True)]
            learn = np.full(mask.shape, text.IGNORE, np.int32)
            learn[mask] = np.concatenate(wanted)
            learn[slots.segments > 0] = text.IGNORE
        groups, prune = None, self.config.prune
        if images_in and prune is not None:
            shares = prune.shares(len(self.config.branches))
            groups = group(shares, owned, slots.visual, mask, self._length)
        placed = any(branch.architecture.axes > 1 for branch in self.config.branches)
        return Batch(
            tokens=slots.ids,
            visual=slots.visual,
            mask=mask,
            segments=slots.segments,
            images=images_in,
            labels=learn,
            groups=groups,
            sizes=sizes,
            place=slots.place if placed else None,
            steps=slots.steps if placed else None,
        )

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
        return agree(
            self._ids(None, input_ids),
            index,
            count,
            tokens=sum(branch.tokens for branch in self.config.branches),
            bucket_of=self._length,
            truncate=truncate,
            multiple=multiple,
        )

    def _ids(
        self, prompts: Sequence[str] | None, input_ids: Sequence[Sequence[int]] | None
    ) -> list[np.ndarray]:
        vocab = self.config.llm.vocab
        stand = [i for b in self.config.branches for i in b.architecture.placeholders]
        return read_ids(prompts, input_ids, tokenize=self.tokenize, vocab=vocab, stand=stand)

    def _length(self, longest: int) -> int:
        return bucket_length(longest, self.lengths, self.config.llm.context)

    def _prepare(
        self,
        pictures: Sequence[Picture],
        counts: Sequence[int],
        words: Sequence[np.ndarray],
        shard: Shard | None,
        alone: bool,
    ) -> tuple[dict[str, Pictures], list[list[Slots]], tuple[int, ...], list[tuple[str, str]]]:
        """Each branch's inputs; each picture's tokens by branch; and visual tokens of the branches.

        Last, of each picture the words that it begins and ends with and that are left out, if
        `alone`.

        Args:
            pictures: of all rows.
            counts: of each row's.
            words: for each picture the text ids of its row.
            shard: see `__call__`.
            alone: pictures stand between a prompt's words, which the tokenizer may join with those
                that a picture begins and ends with; no other branch's tokens are between.
        """
        slots = shard.pictures if shard else None
        if not (pictures or slots):
            return {}, [], (), []
        owner = [i for i, p in enumerate(pictures) for _ in range(frames(p))]
        videos = any(isinstance(p, Video) for p in pictures)
        if slots is not None and (videos or len(owner) > slots):
            raise no_room("pictures", len(owner), slots)
        shown = {convert: open_media(pictures, counts, convert) for convert in self.converts}
        parts: list[list[Slots]] = [[] for _ in pictures]
        around = [("", "")] * len(pictures)
        inputs: dict[str, Pictures] = {}
        sizes: list[int] = []
        for number, branch in enumerate(self.config.branches):
            path = branch.architecture
            ready = path.prepare(shown[path.images.convert], slots)
            if any(run.words for run in ready.runs):
                runs = ready.runs
                if alone:
                    runs, around = map(list, zip(*(run.opened() for run in runs), strict=True))
                tokenizer, vocab = self.require_tokenizer(), self.config.llm.vocab
                say = functools.partial(text.tokenize_words, tokenizer, vocab)
                ready = dataclasses.replace(ready, runs=[run.tokenized(say) for run in runs])
            tokens, gather, size = layout(ready, sum(sizes), number, shard)
            prompt = None
            if path.reads_text:
                own = [words[i] for i in owner]
                room = shard.text if shard else self._length(max(map(len, own)))
                prompt = pad_texts(own, shard.pictures if shard else bucket(len(own)), room)
            inputs[branch.name] = Pictures(ready.inputs, gather, prompt)
            for mine, more in zip(parts, tokens, strict=True):
                mine.append(more)
            sizes.append(size)
        return inputs, parts, tuple(sizes), around

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises InputError if there is none."""
        if self.tokenizer is None:
            raise InputError(
                "tokenizer",
                found="none in the checkpoint folder",
                expected="tokenizer.json, or tokenizer.model and tokenizer_config.json",
                fix="add the files, or pass input_ids in place of prompts",
            )
        return self.tokenizer
