"""Short answers in words: VQAv2, TextVQA, VizWiz, GQA."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vfjax.errors import InputError
from vfjax.eval.data import (
    Benchmark,
    Data,
    Options,
    Question,
    fields,
    integer,
    labelled,
    read_json,
    read_lines,
)
from vfjax.eval.extras import needs
from vfjax.eval.stats import Metric, ratio
from vfjax.eval.yesno import SHORT

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""What LLaVA-1.5 puts before the usual suffix on VizWiz (docs/Evaluation.md)."""


def read_vqav2(data: Data, options: Options) -> list[Question]:
    """VQA's `*_questions.json` and, if it is there, `*_annotations.json` (visualqa.org)."""
    del options
    file = data.file("*OpenEnded*_questions.json", "*questions.json")
    (rows,) = fields(whole := read_json(file), file, "questions")
    subtype = whole.get("data_subtype", "val2014").replace("-dev", "")  # test2015's pictures
    labels: dict[Any, dict[str, Any]] = {}
    for path in sorted(data.folder.glob("*annotations.json")):
        labels |= {row["question_id"]: row for row in read_json(path)["annotations"]}
    if labels and (lost := [r["question_id"] for r in rows if r["question_id"] not in labels]):
        raise InputError(
            data.folder,
            found=f"annotations without question {lost[0]}",
            expected="those of the same split",
            fix=f"put the file that belongs to {file.name} there",
        )
    out = []
    for number, row in enumerate(rows):
        id, image, words = fields(
            row, f"{file} question {number}", "question_id", "image_id", "question"
        )
        image = integer(image, f"{file} question {number}", "image_id")
        name = f"COCO_{subtype}_{image:012d}.jpg"
        label = labels.get(id, {})
        out.append(
            Question(
                id=str(id),
                prompt=words + SHORT,
                images=(data.picture(name, "val2014", "test2015"),),
                answers=tuple(answer["answer"] for answer in label.get("answers", ())),
                cluster=str(image),
                extra={"kind": label.get("answer_type", "")},
            )
        )
    return out


def read_textvqa(data: Data, options: Options) -> list[Question]:
    """TextVQA_0.5.1_val.json; no OCR tokens are put into the prompt."""
    del options
    file, out = data.file("TextVQA_*_val.json", "*.json"), []
    (rows,) = fields(read_json(file), file, "data")
    for number, row in enumerate(rows):
        where = f"{file} row {number}"
        id, image, words = fields(row, where, "question_id", "image_id", "question")
        out.append(
            Question(
                id=str(id),
                prompt=words.capitalize() + SHORT,
                images=(data.picture(f"{image}.jpg", "train_images"),),
                answers=tuple(row.get("answers", ())),
                cluster=str(image),
            )
        )
    return out


def read_vizwiz(data: Data, options: Options) -> list[Question]:
    """VizWiz-VQA's val.json, a list of questions."""
    del options
    file, out = data.file("val.json", "*.json"), []
    for number, row in enumerate(read_lines(file)):
        image, words = fields(row, f"{file} row {number}", "image", "question")
        out.append(
            Question(
                id=image,
                prompt=words.capitalize() + UNANSWERABLE + SHORT,
                images=(data.picture(image, "val"),),
                answers=tuple(answer["answer"] for answer in row.get("answers", ())),
                cluster=image,
            )
        )
    return out


def score_vqav2(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """VQA accuracy, over all and by type of answer, by lmms-eval: see `score_textvqa`."""
    del options
    vqa: Any = needs("lmms_eval.tasks.vqav2.utils", "lmms-eval", "lmms-eval")
    labelled(questions)
    right = []
    for q, text in zip(questions, texts, strict=True):
        answers = [{"answer": a, "answer_id": i} for i, a in enumerate(q.answers)]
        doc = {"question_id": q.id, "answers": answers}  # which it changes
        right.append(vqa.vqav2_process_results(doc, [text])["exact_match"])
    out = {"accuracy": ratio(right)}
    for kind in sorted({q.extra["kind"] for q in questions} - {""}):
        here = np.array([q.extra["kind"] == kind for q in questions])
        out[f"accuracy, {kind}"] = ratio(right * here, here)
    return out


def score_textvqa(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """VQA accuracy by lmms-eval: the mean, with each answer left out, of min(1, matches / 3).

    visualqa.org/evaluation; lmms-eval normalises answers even where all people agree, which the
    official code does not: differences are tiny.
    """
    del options
    vqa: Any = needs("lmms_eval.tasks.textvqa.utils", "lmms-eval", "lmms-eval")
    labelled(questions)
    right = []
    for q, text in zip(questions, texts, strict=True):
        doc = {"question_id": q.id, "answers": list(q.answers)}  # which it changes
        right.append(vqa.textvqa_process_results(doc, [text])["exact_match"])
    return {"accuracy": ratio(right)}


def read_gqa(data: Data, options: Options) -> list[Question]:
    """GQA's testdev_balanced_questions.json: id -> question, imageId, answer."""
    del options
    file, out = data.file("testdev_balanced_questions.json", "*questions*.json"), []
    for id, row in read_json(file).items():
        words, image, answer = fields(row, f"{file} {id}", "question", "imageId", "answer")
        out.append(
            Question(
                id=id,
                prompt=words + SHORT,
                images=(data.picture(f"{image}.jpg", "images"),),
                answers=(answer,),
                cluster=str(image),
            )
        )
    return out


def score_gqa(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Exact match, without case and a last full stop (LLaVA scripts/convert_gqa_for_eval.py)."""
    del options
    pairs = zip(questions, texts, strict=True)
    return {
        "accuracy": ratio([t.strip().rstrip(".").lower() == q.answers[0].lower() for q, t in pairs])
    }


BENCHMARKS = {
    "vqav2": Benchmark(read_vqav2, score_vqav2),
    "textvqa": Benchmark(read_textvqa, score_textvqa),
    "vizwiz": Benchmark(read_vizwiz, score_textvqa),
    "gqa": Benchmark(read_gqa, score_gqa),
}
