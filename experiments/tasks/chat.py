"""A page that asks several models the same about a picture, and shows where each looks."""

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from starlette.types import ASGIApp

from experiments.serve.pictures import read_picture
from experiments.tasks.common import FAMILY, load, named, positive
from experiments.tasks.evaluate import MEMBERS, shipped
from vfjax import Batch, InputError, Model, Processor, stream
from vfjax import analysis as look
from vfjax.eval.data import read_lines
from vfjax.eval.extras import needs
from vfjax.text.messages import Message, tokenize
from vfjax.vision.images import File

LETTERS = 100_000
"""Of a question, at most: more are refused before they are tokenized."""
SIDE = 448
"""Longest side of a picture that is drawn on, in pixels."""
CSS = "#picture img {width: 100%; height: 100%; object-fit: contain}"
"""Small pictures fill their frame."""

ABOUT = (
    "The same picture and question to every model. Below each answer: how much attention of the "
    "question's words lies on each branch's visual tokens, and where (mean over heads, layers "
    "and words, the first token left out; each map is stretched from its smallest to its "
    "largest value)."
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture with a branch's attention drawn over it, and the share that the branch has."""

    picture: Image.Image | None
    share: float


class Upload(Protocol):
    """gradio's FileData."""

    path: str


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model that is asked.

    Attributes:
        name: shown.
        model: itself.
        processor: its own.
    """

    name: str
    model: Model
    processor: Processor

    @property
    def branches(self) -> list[str]:
        return [branch.name for branch in self.model.config.branches]

    def batch(self, picture: File, question: str) -> Batch:
        """The one row of a question.

        Raises:
            InputError: it leaves no room in the context.
        """
        ids, pictures = tokenize(self.processor, [Message("user", (picture, question))])
        context = self.model.context
        length = len(ids)
        if length < context:
            batch = self.processor([pictures], input_ids=[ids])
            length = int(np.asarray(batch.mask).sum())
        if length >= context:
            raise InputError(
                "question",
                found=f"{length} tokens with the picture's",
                expected=f"fewer than {context}, the context of {self.name}",
                fix="shorten it",
            )
        return batch

    def answer(self, batch: Batch, most: int, every: int) -> Iterator[str]:
        """The answer so far, at most `most` tokens, every `every` of them."""
        left = self.model.context - int(np.asarray(batch.mask).sum())
        pieces = stream(
            self.model, self.processor, batch, every=every, max_new_tokens=min(most, left)
        )
        text = ""
        for (piece,) in pieces:
            text += piece
            yield text

    def attention(self, batch: Batch, picture: File) -> list[Seen]:
        """Where the question's words look, a picture a branch."""
        readers = {"question": look.readers(batch)["question"]}
        found, segments = jax.device_get(look.attention(self.model, batch, readers))
        rows, (segment,) = found["question"], segments
        (shares,) = look.shares(rows, segments, len(self.branches)).mean(axis=1)
        mean = rows[0].mean(axis=0)
        out = []
        for k, branch in enumerate(self.model.config.branches):
            shown = picture.rgb(branch.architecture.images.convert)
            boxes = look.regions(branch, shown)
            out.append(Seen(overlay(shown, mean[segment == k + 1], boxes), shares[k + 1]))
        return out


def run(config: ConfigDict, workdir: Path) -> None:
    gradio = _gradio()
    needs("matplotlib", "plot", "matplotlib", where="config.task")
    from experiments.serve.server import address, listen, serve  # its uvicorn is gradio's

    positive(config, "max_new_tokens", "every", "max_body", "max_pixels", "queue")
    folders = named("members", (*config.members, *([config.model] if config.model else [])))
    with listen(config.host, config.port) as listener:
        examples = []
        if not folders:
            workdir.mkdir(parents=True, exist_ok=True)
            folders = {name: str(FAMILY / name) for name in MEMBERS}
            folders["fused"] = str(shipped(workdir))
            examples = scenes(workdir)
        speakers = [speaker(config, name, folder) for name, folder in folders.items()]
        app = page(gradio, config, speakers, examples)
        print(f"{', '.join(folders)} at {address(listener)}", flush=True)
        serve(app, listener, timeout=1, log_level="critical")


def _gradio() -> ModuleType:
    """The module; no extra can name it, as it asks for an older Pillow than vfjax, in vain."""
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise InputError(
            "config.task",
            found=f"no gradio ({error})",
            expected="it",
            fix="pip install gradio, and after it pip install 'pillow>=13'",
        ) from None


def speaker(config: ConfigDict, name: str, folder: str) -> Speaker:
    """Loads a model.

    Raises:
        InputError: it has no eyes, or no tokenizer.
    """
    model, processor = load(config, folder)
    processor.require_tokenizer()
    if not model.config.branches:
        raise InputError(
            folder, found="a plain LLM", expected="a model with eyes", fix="name another"
        )
    return Speaker(name, model, processor)


def scenes(workdir: Path, count: int = 4) -> list[list[str]]:
    """Pictures that the shipped family was made for, each with a question."""
    from experiments.family import scenes as family

    folder = workdir / f"scenes-{count}"
    family.ensure(folder, "test", count, seed=0)
    rows = read_lines(folder / "scenes.json")
    kinds = ("colour", "ocr", "locdig", "count")
    return [
        [str((folder / "images" / row["image"]).absolute()), row["questions"][kind][0]]
        for row, kind in zip(rows, kinds, strict=False)
    ]


# The page


def page(
    gradio: ModuleType,
    config: ConfigDict,
    speakers: Sequence[Speaker],
    examples: Sequence[Sequence[str]],
) -> ASGIApp:
    """The page as an ASGI application; nothing in it comes from elsewhere, or tells anybody.

    Args:
        gradio: the module.
        config: of the task.
        speakers: a column each.
        examples: pictures' paths, each with a question.
    """
    from fastapi import FastAPI

    fonts = ("system-ui", "sans-serif")
    theme = gradio.themes.Default(font=fonts, font_mono=("monospace",))
    with gradio.Blocks(title="vfjax", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown(f"# {', '.join(each.name for each in speakers)}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                picture = gradio.Image(
                    label="picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    image_mode=None,
                    height=300,
                    elem_id="picture",
                    buttons=[],
                )
                picture.preprocess = (
                    _path  # gradio's own opens the file, and trips over broken ones
                )
                question = gradio.Textbox(label="question", lines=2, max_length=LETTERS)
                button = gradio.Button("Ask", variant="primary")
                note = gradio.Textbox(label="note", visible=False, elem_id="note")
                if examples:
                    gradio.Examples(examples, [picture, question])
            with gradio.Column(scale=3), gradio.Row():
                columns = [_column(gradio, each) for each in speakers]
        gradio.Markdown(ABOUT)
        shown = [part for column in columns for part in column]

        def answer(path: str | None, text: str | None) -> Iterator[dict[object, object]]:
            yield {note: gradio.update(visible=False), **_cleared(gradio, speakers, columns)}
            try:
                for i, said, seen in ask(config, speakers, path, text):
                    yield _shown(gradio, speakers[i], columns[i], said, seen)
            except InputError as error:
                yield {note: gradio.update(value=str(error), visible=True)}

        for event in (button.click, question.submit):
            event(
                answer,
                [picture, question],
                [note, *shown],
                api_name="ask",
                trigger_mode="always_last",  # asked while another is answered: afterwards
            )
    blocks.queue(max_size=config.queue, default_concurrency_limit=1)
    return gradio.mount_gradio_app(
        FastAPI(),
        blocks,
        path="/",
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size=config.max_body,
        app_kwargs={"docs_url": None, "redoc_url": None},
    )


def _path(payload: Upload | None) -> str | None:
    """Of an uploaded file; gradio has checked that it is one."""
    return None if payload is None else payload.path


def _column(gradio: ModuleType, speaker: Speaker) -> list[object]:
    """A model's answer and its branches' maps."""
    with gradio.Column(min_width=200):
        said = gradio.Textbox(label=speaker.name, lines=2, interactive=False, elem_classes="answer")
        maps = [
            gradio.Image(label=name, interactive=False, buttons=["fullscreen"], format="png")
            for name in speaker.branches
        ]
    return [said, *maps]


def _cleared(
    gradio: ModuleType, speakers: Sequence[Speaker], columns: Sequence[Sequence[object]]
) -> dict[object, object]:
    """All columns as they were at first."""
    return {
        part: gradio.update(value=None, label=label)
        for column, each in zip(columns, speakers, strict=True)
        for part, label in zip(column, (each.name, *each.branches), strict=True)
    }


def _shown(
    gradio: ModuleType, speaker: Speaker, column: Sequence[object], said: str, seen: Sequence[Seen]
) -> dict[object, object]:
    """What changes in a model's column."""
    out: dict[object, object] = {column[0]: said}
    for part, name, one in zip(column[1:], speaker.branches, seen, strict=False):
        label = f"{name}: {one.share:.0%} of attention"
        out[part] = gradio.update(value=one.picture, label=label)
    return out


# What is asked


def ask(
    config: ConfigDict, speakers: Sequence[Speaker], picture: str | None, question: str | None
) -> Iterator[tuple[int, str, list[Seen]]]:
    """Which model, its answer so far, and at its end where it looks.

    Args:
        config: of the task.
        speakers: in turn.
        picture: path.
        question: as it was typed.

    Raises:
        InputError: there is no picture, no question, or something is wrong with either.
    """
    question = _question(question)
    opened = _picture(picture, config.max_pixels)
    batches = [each.batch(opened, question) for each in speakers]  # all fit before one answers
    for i, (each, batch) in enumerate(zip(speakers, batches, strict=True)):
        text = ""
        for text in each.answer(batch, config.max_new_tokens, config.every):
            yield i, text, []
        yield i, text or "(an empty answer)", each.attention(batch, opened)


def _question(text: str | None) -> str:
    text = (text or "").strip()
    if not text:
        raise InputError("question", found="nothing", expected="a text", fix="write one")
    if len(text) > LETTERS:
        raise InputError(
            "question",
            found=f"{len(text)} letters",
            expected=f"at most {LETTERS}",
            fix="shorten it",
        )
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        raise InputError(
            "question",
            found="half of a surrogate pair",
            expected="whole characters",
            fix="write it anew",
        )
    return text


def _picture(path: str | None, pixels: int) -> File:
    if not path:
        raise InputError("picture", found="nothing", expected="a file", fix="choose one")
    return read_picture(Path(path), "picture", pixels)


def overlay(picture: Image.Image, weights: np.ndarray, boxes: np.ndarray) -> Image.Image | None:
    """The picture under a map of the weights; None where no token has a place in it."""
    import matplotlib

    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    heat = look.paint(weights, boxes, (48, 48))
    if not heat.any():
        return None
    heat = (heat - heat.min()) / max(np.ptp(heat), 1e-30)
    large = Image.fromarray((heat * 255).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    colours = Image.fromarray(matplotlib.colormaps["jet"](np.asarray(large), bytes=True)[..., :3])
    how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
    shown = picture.resize((width, height), how)
    return Image.composite(colours, shown, large.point(lambda level: 30 + level // 2))
