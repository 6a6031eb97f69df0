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
    as_text,
    as_texts,
    fields,
    integer,
    labelled,
    objects,
    read_by_id,
    read_json,
    read_lines,
    read_object,
    text_fields,
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
    whole = read_object(file, "questions")
    (rows,) = fields(whole, file, "questions")
    subtype = as_text(whole.get("data_subtype", "val2014"), file, "data_subtype")
    subtype = subtype.replace("-dev", "")  # test2015's pictures
    labels: dict[str, dict[str, Any]] = {}
    for path in sorted(data.folder.glob("*annotations.json")):
        (found,) = fields(read_json(path), path, "annotations")
        for number, row in enumerate(objects(found, path, "annotations")):
            (id,) = text_fields(row, f"{path} annotation {number}", "question_id")
            labels[id] = row
    out = []
    for number, row in enumerate(objects(rows, file, "questions")):
        where = f"{file} question {number}"
        id, asked = text_fields(row, where, "question_id", "question")
        image = integer(fields(row, where, "image_id")[0], where, "image_id")
        if labels and id not in labels:
            raise InputError(
                data.folder,
                found=f"annotations without question {id}",
                expected="those of the same split",
                fix=f"put the file that belongs to {file.name} there",
            )
        name = f"COCO_{subtype}_{image:012d}.jpg"
        label = labels.get(id, {})
        out.append(
            Question(
                id=id,
                prompt=asked + SHORT,
                images=(data.picture(name, "val2014", "test2015"),),
                answers=_answers(label, f"annotation of question {id}"),
                cluster=str(image),
                extra={"kind": as_text(label.get("answer_type", ""), where, "answer_type")},
            )
        )
    return out


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """Answers of ten people, none where they are not published."""
    said = objects(row.get("answers", ()), where, "answers")
    return tuple(text_fields(answer, where, "answer")[0] for answer in said)


def read_textvqa(data: Data, options: Options) -> list[Question]:
    """TextVQA_0.5.1_val.json; no OCR tokens are put into the prompt."""
    del options
    file, out = data.file("TextVQA_*_val.json", "*.json"), []
    (rows,) = fields(read_json(file), file, "data")
    for number, row in enumerate(objects(rows, file, "data")):
        where = f"{file} row {number}"
        id, image, asked = text_fields(row, where, "question_id", "image_id", "question")
        out.append(
            Question(
                id=id,
                prompt=asked.capitalize() + SHORT,
                images=(data.picture(f"{image}.jpg", "train_images"),),
                answers=as_texts(row.get("answers", ()), where, "answers"),
                cluster=image,
            )
        )
    return out


def read_vizwiz(data: Data, options: Options) -> list[Question]:
    """VizWiz-VQA's val.json, a list of questions."""
    del options
    file, out = data.file("val.json", "*.json"), []
    for number, row in enumerate(read_lines(file)):
        where = f"{file} row {number}"
        image, asked = text_fields(row, where, "image", "question")
        out.append(
            Question(
                id=image,
                prompt=asked.capitalize() + UNANSWERABLE + SHORT,
                images=(data.picture(image, "val"),),
                answers=_answers(row, where),
                cluster=image,
            )
        )
    return out


def score_vqav2(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """VQA accuracy, over all and by type of answer, by lmms-eval: see `score_textvqa`."""
    del options
    vqa = needs("lmms_eval.tasks.vqav2.utils", "lmms-eval", "lmms-eval")
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
    vqa = needs("lmms_eval.tasks.textvqa.utils", "lmms-eval", "lmms-eval")
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
    for id, row in read_by_id(file).items():
        asked, image, answer = text_fields(row, f"{file} {id}", "question", "imageId", "answer")
        out.append(
            Question(
                id=id,
                prompt=asked + SHORT,
                images=(data.picture(f"{image}.jpg", "images"),),
                answers=(answer,),
                cluster=image,
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
