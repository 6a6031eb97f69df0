"""Captions: COCO and Flickr30k."""

import contextlib
import io
from collections.abc import Sequence

from vfjax.errors import InputError
from vfjax.eval.data import (
    Benchmark,
    Data,
    Options,
    Question,
    fields,
    objects,
    read_object,
    text_fields,
)
from vfjax.eval.extras import needs
from vfjax.eval.stats import Metric, ratio

PROMPT = "Provide a one-sentence caption for the provided image."
"""LLaVA-1.5's words for captions (arXiv 2310.03744, appendix), as in lmms-eval."""


def read_captions(data: Data, options: Options) -> list[Question]:
    """COCO's captions_*.json, or Karpathy's dataset_coco.json and dataset_flickr30k.json.

    Of Karpathy's, the rows of `split`. A picture is one question, its captions the answers.
    """
    file = data.file("captions_*.json", "dataset_*.json", "*.json")
    whole = read_object(file, "images")
    (images,) = fields(whole, file, "images")
    images = objects(images, file, "images")
    found: dict[str, tuple[str, list[str]]] = {}
    if "annotations" in whole:
        for row in images:
            id, name = text_fields(row, f"{file} images", "id", "file_name")
            found[id] = (name, [])
        for row in objects(whole["annotations"], file, "annotations"):
            image, caption = text_fields(row, f"{file} annotations", "image_id", "caption")
            if image not in found:
                raise InputError(
                    file,
                    found=f"a caption of image {image}",
                    expected="one of its images",
                    fix="copy the file again",
                )
            found[image][1].append(caption)
    else:
        for number, row in enumerate(images):
            where = f"{file} image {number}"
            name, split = text_fields(row, where, "filename", "split")
            if split == options["split"]:
                (id,) = text_fields({"cocoid": name} | row, where, "cocoid")
                (said,) = fields(row, where, "sentences")
                said = [text_fields(s, where, "raw")[0] for s in objects(said, where, "sentences")]
                found[id] = (name, said)
    return [
        Question(
            id=id,
            prompt=PROMPT,
            images=(data.picture(name, "val2014", "flickr30k-images"),),
            answers=tuple(captions),
            cluster=id,
        )
        for id, (name, captions) in found.items()
        if captions
    ]


def score_captions(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """CIDEr (x 100), BLEU, ROUGE-L by pycocoevalcap, after its tokenizer; needs Java.

    BLEU and METEOR are of the whole set and have no interval; the others are means over the
    pictures.
    METEOR, which is slow, if `meteor` is set. SPICE is not computed: pycocoevalcap would download
    what it needs.
    """
    scorers = {
        "CIDEr": _of("cider.cider", "Cider"),
        "BLEU": _of("bleu.bleu", "Bleu"),
        "ROUGE-L": _of("rouge.rouge", "Rouge"),
    }
    if options["meteor"]:
        scorers["METEOR"] = _of("meteor.meteor", "Meteor")
    tokenizer = _of("tokenizer.ptbtokenizer", "PTBTokenizer")
    try:
        said = tokenizer().tokenize(
            {q.id: [{"caption": t}] for q, t in zip(questions, texts, strict=True)}
        )
        right = tokenizer().tokenize({q.id: [{"caption": a} for a in q.answers] for q in questions})
        out: dict[str, Metric] = {}
        with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints
            for name, scorer in scorers.items():
                whole, each = scorer().compute_score(right, said)
                if name == "BLEU":
                    out |= {f"BLEU-{n}": Metric(100 * b) for n, b in enumerate(whole, 1)}
                elif name == "METEOR":
                    out[name] = Metric(100 * whole)
                else:
                    out[name] = ratio(each, value=100 * whole)
    except FileNotFoundError as error:
        raise InputError(
            "config.benchmark",
            found=f"no {error.filename}",
            expected="Java on the PATH, for pycocoevalcap's tokenizer",
            fix="install it, or pass --config.mode=predict and score elsewhere",
        ) from None
    return out


def _of(module: str, name: str) -> type:
    return getattr(needs(f"pycocoevalcap.{module}", "eval", "pycocoevalcap"), name)


BENCHMARKS = {
    "captions": Benchmark(read_captions, score_captions, 64, {"split": "test", "meteor": False})
}
