"""Rows of a batch as they are given: prompts or ids, labels, pictures; checked, on the host."""

import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from vfjax.architectures.base import Media, Prompt
from vfjax.errors import InputError, counted
from vfjax.text.prompts import IMAGE_ID, IMAGE_TOKEN
from vfjax.vision.images import Convert, File, open_image
from vfjax.vision.video import Video

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray | File | Video
"""What users give at a placeholder."""


def read_ids(
    prompts: Sequence[str] | None,
    input_ids: Sequence[Sequence[int]] | None,
    *,
    tokenize: Callable[[str], Sequence[int]],
    vocab: int,
    stand: Sequence[int] = (),
) -> list[np.ndarray]:
    """Each row's ids, int64[r], -200 at each picture.

    Args:
        prompts: texts; or None.
        input_ids: in place of them, ids.
        tokenize: ids of a prompt.
        vocab: of the LLM.
        stand: ids that stand for a picture, too.

    Raises:
        InputError: both or neither are given, no row, an empty one, or an id outside `vocab`.
    """
    if isinstance(prompts, str):
        raise InputError(
            "prompts", found="one str", expected="a list of prompts", fix="pass [prompt]"
        )
    given = prompts if input_ids is None else input_ids
    if given is None or (prompts is None) == (input_ids is None) or not len(given):
        raise InputError(
            "processor",
            found="both or neither" if (prompts is None) == (input_ids is None) else "no row",
            expected="prompts or input_ids, at least one row",
            fix="pass one of the two",
        )
    if prompts is not None:
        input_ids = [tokenize(prompt) for prompt in prompts]
    assert input_ids is not None
    rows = [np.asarray(row, np.int64) for row in input_ids]
    rows = [np.where(np.isin(row, stand), IMAGE_ID, row) for row in rows]
    for i, row in enumerate(rows):
        bad = row[(row != IMAGE_ID) & ((row < 0) | (row >= vocab))]
        if bad.size or not row.size:
            raise InputError(
                f"row {i}",
                found=f"token id {bad[0]}" if bad.size else "no token",
                expected=f"ids below {vocab}, {IMAGE_ID} for a picture",
                fix="use the checkpoint's own tokenizer",
            )
    return rows


def placeholders(row: np.ndarray) -> int:
    """How many pictures stand in a row of ids."""
    return int((row == IMAGE_ID).sum())


def texts(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each picture the text ids of its row."""
    return [row[row != IMAGE_ID] for row in rows for _ in range(placeholders(row))]


def bucket_length(longest: int, lengths: Sequence[int], context: int) -> int:
    """The length that rows are filled up to: the smallest that holds the longest of them.

    Args:
        longest: tokens of a row, visual ones included.
        lengths: to choose from, beside the context.
        context: of the LLM.

    Raises:
        InputError: it does not fit the context.
    """
    if longest > context:
        raise InputError(
            "prompt",
            found=f"{longest} tokens, visual ones included",
            expected=f"at most {context}, the LLM's context",
            fix="shorten the prompt or pass fewer pictures",
        )
    return min(length for length in (*lengths, context) if length >= longest)


def check_labels(labels: Sequence[Sequence[int]], rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Labels as int32[r] of each row.

    Raises:
        InputError: other numbers of rows, or of labels in a row, than `rows` has of ids.
    """
    for i, row in enumerate(rows):
        if len(labels) != len(rows) or len(labels[i]) != len(row):
            raise InputError(
                f"labels of row {i}",
                found=counted(len(labels), "row")
                if len(labels) != len(rows)
                else counted(len(labels[i]), "label"),
                expected=f"{counted(len(rows), 'row')}, {counted(len(row), 'label')} in this one, "
                "one an id",
                fix="label every id, -100 where there is nothing to learn",
            )
    return [np.asarray(each, np.int32) for each in labels]


def read_pictures(
    images: Sequence[Picture | Sequence[Picture]] | None, rows: Sequence[np.ndarray], branches: int
) -> list[Picture]:
    """All pictures in the order of their placeholders.

    Args:
        images: of the whole batch; or, if any item is a list, one list a row.
        rows: ids.
        branches: visual ones of the model.

    Raises:
        InputError: one picture in place of a list, another number than there are placeholders, or
            pictures for a model without a branch.
    """
    places = [placeholders(row) for row in rows]
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
                + counted(expected, f"{IMAGE_TOKEN} placeholder"),
                expected="as many of one as of the other",
                fix=f"put one {IMAGE_TOKEN} into the prompt at each picture",
            )
    pictures = [picture for group in lists for picture in group]
    if pictures and not branches:
        raise InputError(
            "images",
            found=counted(len(pictures), "picture"),
            expected="none: this model is a plain LLM without a visual branch",
            fix="load a multimodal checkpoint",
        )
    return pictures  # type: ignore[return-value]


def frames(picture: Picture) -> int:
    """Pictures that are shown of one, or of a video."""
    return len(picture.frames) if isinstance(picture, Video) else 1


def open_media(
    pictures: Sequence[Picture], counts: Sequence[int], convert: Convert
) -> list[list[Media]]:
    """Each row's pictures, RGB, and videos.

    Args:
        pictures: of all rows.
        counts: of each row's.
        convert: how pictures become RGB.

    Raises:
        InputError: as `vfjax.vision.images.open_image`.
    """
    rest = (p if isinstance(p, Video) else open_image(p, convert=convert) for p in pictures)
    return [list(itertools.islice(rest, count)) for count in counts]


def pad_texts(texts: Sequence[np.ndarray], count: int, length: int) -> Prompt:
    """Texts that stand around pictures or frames, filled up with padding.

    Args:
        texts: of each its ids.
        count: n of the result, at least as many as there are.
        length: l of the result, at least the longest one's.
    """
    ids, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for i, row in enumerate(texts):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    return Prompt(ids, mask)
