"""Transformers' folders of Idefics3 and SmolVLM, whose models are the same but for their names.

What its processor writes around a picture's tiles is text to the folder's tokenizer: the ids of
each mark, and of the newlines between rows, are read off what it makes of the largest grid.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import registry
from converters.formats.port import port_source
from converters.params import mlp
from converters.params.table import TRANSPOSE, Names, Rule, Table
from converters.preprocessor import IDLE, PROCESSOR, defaulted, read_preprocessor
from converters.source import Layout, Source, tokenizer_class
from converters.tokenizer import load_tokenizer
from converters.towers import Towers
from converters.values import ANY, MOST_ID, PRETRAINED, REQUIRED, Unused, Values
from vfjax import InputError
from vfjax.architectures import Combine, Film, Idefics, Marks, MLPConfig, PixelShuffleConfig
from vfjax.architectures.base import PatchEncoder
from vfjax.architectures.idefics import largest_grid
from vfjax.atomic import read_json
from vfjax.errors import cut
from vfjax.vision.images import ImageSpec

EDGE = 1 << 16
"""Most pixels of an edge."""


def read(hf: Values) -> PixelShuffleConfig:
    """From `din`, `dout` and `scale`."""
    projector = MLPConfig(hf.whole("din"), hf.whole("dout"), layers=1, bias=False)
    last = Combine(((-1,),), drop=0)
    return PixelShuffleConfig(projector, last, hf.whole("scale"), normed=False)


def path(
    hf: Values, images: ImageSpec, encoder: PatchEncoder, connector: PixelShuffleConfig
) -> Idefics:
    """From `longest`, `split`, `marks` and `film`.

    Raises:
        InputError: a view's patches are no multiple of the scale, or there are no marks.
    """
    side = math.isqrt(encoder.tokens)
    if not side or side % connector.factor:
        raise InputError(
            f"{hf.where}: scale_factor",
            found=f"{connector.factor}, and views of {side} x {side} patches",
            expected="a divisor of the patches a side",
            fix="correct scale_factor, max_image_size or patch_size",
        )
    marks, film = hf.section("marks", None), hf.section("film", None)
    if not marks.data:
        raise InputError(
            hf.where,
            found="no tokenizer, which has the ids of what is written around pictures",
            expected="tokenizer.json",
            fix="copy it from the published repository",
        )
    ids = {
        key: marks.wholes(key, least=0, most=MOST_ID) for key in ("edge", "line", "last", "whole")
    }
    return Idefics(
        encoder,
        connector,
        images,
        longest=hf.whole("longest", most=EDGE),
        split=hf.flag("split"),
        marks=Marks(tiles=_lists(marks, "tiles"), **ids),
        film=_made_film(film) if film.data else None,
    )


def _made_film(hf: Values) -> Film:
    edge_, tile = hf.whole("edge", most=EDGE), hf.whole("tile", most=EDGE)
    return Film(edge_, tile, hf.whole("frames", None), hf.number("rate", None, least=1e-9))


def _lists(hf: Values, key: str) -> tuple[tuple[int, ...], ...]:
    found = hf.any(key, REQUIRED)
    if not isinstance(found, list | tuple):
        raise hf.error(key, "lists of ids")
    each = Values({str(i): part for i, part in enumerate(found)}, f"{hf.where}: {key}")
    return tuple(each.wholes(i, least=0, most=MOST_ID) for i in each.data)


TABLE = Table(
    types=("idefics3",),
    read=read,
    unused={"aux": ANY},
    ids={"marks": True},
    path=path,
    recorded=mlp.recorded,
    rules=(Rule("modality_projection.proj.weight", "projector/layers/0/kernel", TRANSPOSE),),
)

IMAGES = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 1,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""Defaults of the image processors, and of SmolVLM's video processor."""

SETTINGS: Unused = {
    **IDLE,
    "input_data_format": ANY,
    "return_row_col_info": ANY,
    "_valid_processor_keys": ANY,
}
"""Other settings, without effect on a picture's pixels at these values."""

EDGES = {"size": 4 * 364, "max_image_size": 364}


def edge(values: Values, key: str) -> int:
    """`{"longest_edge": n}`.

    Raises:
        InputError: another form.
    """
    found = values.any(key)
    section = Values({} if found is None else found, f"{values.where}: {key}")
    if found is not None and set(found if isinstance(found, Mapping) else ()) != {"longest_edge"}:
        raise values.error(key, '{"longest_edge": pixels}')
    return section.whole("longest_edge", EDGES[key], most=EDGE)


def pixels(values: Values) -> dict[str, Any]:
    """A processor's settings of pixels, as those of SigLIP's, which stretches a tile as it is.

    Raises:
        InputError: a setting that is not followed.
    """
    found = defaulted(values, IMAGES)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if found[key] is not True:
            raise values.error(key, "true")
    side = edge(values, "max_image_size")
    size = {"height": side, "width": side}
    return {"image_processor_type": "SiglipImageProcessor", **found, "size": size}


def describe(folder: Path, config: Values, towers: Towers) -> Source:
    """Normal form of a folder.

    Raises:
        InputError: settings of the processors that are not the model's, or a tokenizer without the
            marks.
    """
    del towers  # the tower is in the folder
    family = config.text("model_type")
    tower = {**config.mapping("vision_config"), "model_type": f"{family}_vision"}
    llm = _text(config)
    encoder, decoder = (
        registry.find(part, f"{config.where}: {key}").config(part, f"{config.where}: {key}")
        for key, part in (("vision_config", tower), ("text_config", llm))
    )
    scale = config.whole("scale_factor", 2)
    connector: dict[str, Any] = {
        "model_type": "idefics3",
        "din": encoder.width * scale**2,
        "dout": decoder.width,
        "scale": scale,
    }
    branch: dict[str, Any] = {
        "name": family,
        "encoder": tower,
        "preprocessor": {},
        "aspect": "crop",
        "code": "transformers",
        "connector": connector,
    }
    found = read_preprocessor(folder)
    if found:
        values = Values(found, f"{folder}: image processor")
        kind = values.text("image_processor_type", None)
        if kind and not re.fullmatch("(Idefics3|SmolVLM)ImageProcessor(Fast|Pil)?", kind):
            raise values.error("image_processor_type", "Idefics3ImageProcessor")
        branch["preprocessor"] = pixels(values)
        connector["longest"] = edge(values, "size")
        connector["split"] = values.flag("do_image_splitting", True)
        side = branch["preprocessor"]["size"]["height"] // encoder.patch
        video = _processor(folder, side**2 // scale**2)
        if family == "smolvlm":
            connector["film"] = _film(folder, branch["preprocessor"], values, video)
        values.done(SETTINGS | dict.fromkeys(VIDEO, ANY))
    source = port_source(folder, "idefics3-hf", config, branch, llm, image_id=128257)
    if found:
        _marks(source, connector, branch["preprocessor"]["size"]["height"], decoder.vocab)
    return source


def _text(config: Values) -> dict[str, Any]:
    """The LLM's config; which class wrote it, and what the class is not, say nothing to Llama's."""
    text = dict(config.mapping("text_config"))
    text.setdefault("model_type", "llama")
    beside = {key: text.pop(key) for key in TEXT if key in text}
    Values(beside, f"{config.where}: text_config").done(TEXT)
    for key in ("torch_dtype", "dtype"):
        if key in config:
            text.setdefault(key, config.any(key))
    # The text's own counts for nothing.
    return {**text, "tie_word_embeddings": config.flag("tie_word_embeddings", False)}


TEXT: Unused = {
    "architectures": ANY,
    "neftune_noise_alpha": ANY,  # of training
    "perceiver_config": ANY,
    "pixel_shuffle_factor": ANY,  # scale_factor says it
    "qk_layer_norms": (False,),
    "use_resampler": (False,),
}
"""Keys of text_config in early folders."""

VIDEO = ("fps", "num_frames", "video_sampling")
"""Settings of videos, which early folders have among those of pictures."""


def _processor(folder: Path, tokens: int) -> Mapping[str, Any] | None:
    """The video processor's settings, if processor_config.json has them.

    Raises:
        InputError: transformers' processor counts other `tokens` of a view than the model makes, or
            there is a key that is not known.
    """
    file = folder / "processor_config.json"
    values = Values(read_json(file) if file.is_file() else {}, str(file), {"image_seq_len": 169})
    if values.whole("image_seq_len") != tokens:
        raise values.error("image_seq_len", f"{tokens}, the tokens of a view that the model makes")
    video = values.mapping("video_processor", None)
    values.done({**PROCESSOR, "image_token": ANY})
    return video


def _film(
    folder: Path, pictures: Mapping[str, Any], images: Values, video: Mapping[str, Any] | None
) -> dict[str, Any]:
    """How videos are read.

    transformers takes the settings of processor_config.json, of video_preprocessor_config.json, or
    those of pictures.

    Raises:
        InputError: a frame would have other pixels than a tile.
    """
    beside = folder / "video_preprocessor_config.json"
    if video is None and beside.is_file():
        video = read_json(beside)
    values = images if video is None else Values(video, f"{folder}: video processor")
    if video is not None:
        kind = values.text("video_processor_type", None)
        if kind not in (None, "SmolVLMVideoProcessor"):
            raise values.error("video_processor_type", "SmolVLMVideoProcessor")
        own = pixels(values)
        values.any("image_processor_type")
        values.any("do_image_splitting")
        for key, value in own.items():
            if key not in ("size", "do_convert_rgb") and value != pictures[key]:
                raise InputError(
                    f"{values.where}: {key}",
                    found=cut(repr(value)),
                    expected=f"{cut(repr(pictures[key]))}, as the image processor's",
                    fix="correct one of them",
                )
    if pictures["resample"] not in (1, 3):
        raise values.error("resample", "1 or 3, Lanczos or bicubic, by which frames are resized")
    size = edge(values, "size")
    sampling = values.section("video_sampling", None)
    frames, rate = values.whole("num_frames", None), values.number("fps", None)
    if sampling.data:
        frames, rate = sampling.whole("max_frames"), sampling.number("fps")
        if "size" not in values:
            size = edge(sampling, "video_size")
        sampling.done({"video_size": ANY})  # which `size` takes the place of
    if video is not None:
        values.done(SETTINGS)
    tile = edge(values, "max_image_size")
    return {"edge": size, "tile": tile, "frames": frames, "rate": rate}


def _marks(source: Source, connector: dict[str, Any], tile: int, rows: int) -> None:
    """Adds the ids of what stands around tiles, of the folder's tokenizer.

    Raises:
        InputError: it lacks the tokens around a picture, or has more than the LLM.
    """
    tokenizer = load_tokenizer(source.path, tokenizer_class(source.config))
    if tokenizer is None:
        return
    smol = source.config["model_type"] == "smolvlm"
    names = ("fake_image_token", "image_token", "global_image_token")
    own = [getattr(tokenizer, name, None) if smol else None for name in names]
    edge_, image, whole = (a or b for a, b in zip(own, MARKS, strict=True))
    most = largest_grid(connector["longest"], tile) if connector["split"] else 0
    text = written(most, edge_, image, whole)
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    special = [tokenizer.added_tokens_encoder.get(token) for token in (edge_, image)]
    for token, number in zip((edge_, image), special, strict=True):
        if number is None:
            raise InputError(
                f"{source.path}: tokenizer",
                found=f"no special token {token}",
                expected="it, around and within each picture",
                fix="copy the tokenizer's files from the published repository",
            )
    if max(ids) >= rows:
        raise InputError(
            f"{source.path}: tokenizer",
            found=f"id {max(ids)} of {tokenizer.convert_ids_to_tokens(max(ids))!r}",
            expected=f"ids below {rows}, the rows of the embedding",
            fix="use the checkpoint's own tokenizer",
        )
    _, *tiles, last = _split(ids, special[0])
    parts = [_split(each, special[1]) for each in tiles]
    connector["marks"] = {
        "edge": [special[0]],
        "tiles": [before for before, _ in parts[:-1]],
        "line": parts[most - 1][1] if most else [],
        "last": parts[-2][1] if most else [],
        "whole": parts[-1][0],
    }
    assert not last and all(len(part) == 2 for part in parts)


MARKS = ("<fake_token_around_image>", "<image>", "<global-img>")


def written(most: int, around: str, image: str, whole: str) -> str:
    """What the processors write for a picture of `most` tiles a side, one token each.

    transformers' `get_image_prompt_string` of SmolVLM, `replace_image_token` of Idefics3.
    """
    lines = [
        "".join(f"{around}<row_{row + 1}_col_{col + 1}>{image}" for col in range(most)) + "\n"
        for row in range(most)
    ]
    gap = "\n" if most else ""
    return f"{''.join(lines)}{gap}{around}{whole}{image}{around}"


def _split(ids: Sequence[int], at: int | None) -> list[list[int]]:
    """Ids between those that are `at`."""
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == at:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def names(source: Source) -> Names:
    """Names of the hub, which are those of transformers in memory and on disk."""
    branch = f"branches.{source.branches[0].name}"
    return (
        ("model.text_model.", "llm", "model."),
        ("lm_head.", "llm", "lm_head."),
        ("model.vision_model.", f"{branch}.encoder", ""),
        ("model.connector.", f"{branch}.connector", ""),
    )


LAYOUTS = (
    Layout(
        "idefics3-hf",
        lambda config: config.get("model_type") in ("idefics3", "smolvlm"),
        describe,
        names,
        unused={
            **PRETRAINED,
            "_pad_token_id": ANY,  # of batches
            "image_token_id": ANY,  # pictures stand where -200 does
            "use_reentrant_checkpointing": ANY,
            "vocab_size": ANY,  # text_config says it
        },
    ),
)
