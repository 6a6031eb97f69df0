"""Benchmarks that an LLM judges: MM-Vet, LLaVA-Bench in the wild, MathVista."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vfjax.errors import InputError
from vfjax.eval.data import (
    Benchmark,
    Data,
    Options,
    Question,
    as_texts,
    fields,
    integer,
    read_by_id,
    read_json,
    read_lines,
    text_fields,
)
from vfjax.eval.judge import Messages
from vfjax.eval.stats import Metric, ratio

# Words of yuweihao/MM-Vet mm-vet_evaluator.ipynb, as in lmms-eval.
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the "
    "countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its "
    "beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is "
    "saying that the person has trust issues because the names of these countries do not "
    "accurately represent their landscapes. | "
)
MM_VET = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the "
    "prediction. <AND> in the ground truth means it is totally right only when all elements in the "
    "ground truth are present in the prediction, and <OR> means it is totally right when any one "
    "element in the ground truth is present in the prediction. The correctness score is 0.0 "
    "(totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just "
    "complete the last space of the correctness score.\n"
    "\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{_MEME}The meme talks about Iceland and Greenland. It's pointing out that despite their "
    "names, Iceland is not very icy and Greenland isn't very green. | 0.4\n"
    f"{_MEME}The meme is using humor to point out the misleading nature of Iceland's and "
    "Greenland's names. Iceland, despite its name, has lush green landscapes while Greenland is "
    "mostly covered in ice and snow. The text 'This is why I have trust issues' is a playful way "
    "to suggest that these contradictions can lead to distrust or confusion. The humor in this "
    "meme is derived from the unexpected contrast between the names of the countries and their "
    "actual physical characteristics. | 1.0\n"
)


def read_mmvet(data: Data, options: Options) -> list[Question]:
    """mm-vet.json: id -> imagename, question, answer, capability."""
    del options
    file, out = data.file("mm-vet.json", "*.json"), []
    for id, row in read_by_id(file).items():
        where = f"{file} {id}"
        image, asked, answer = text_fields(row, where, "imagename", "question", "answer")
        out.append(
            Question(
                id=id,
                prompt=asked,
                images=(data.picture(image, "images"),),
                answers=(answer,),
                cluster=image,
                extra={"kinds": as_texts(row.get("capability", ()), where, "capability")},
            )
        )
    return out


def score_mmvet(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Mean of the judge's scores, 0 to 1, in per cent; over all and by capability."""
    asked = {
        q.id: _user(
            f"{MM_VET}{q.prompt} | "
            f"{q.answers[0].replace('<AND>', ' <AND> ').replace('<OR>', ' <OR> ')} | {text} |"
        )
        for q, text in zip(questions, texts, strict=True)
    }
    replies = _ask(options, asked)
    found = [re.match(r"\s*(\d(?:\.\d+)?)", replies[q.id]) for q in questions]
    grades = np.array([min(float(m[1]), 1.0) if m else 0.0 for m in found])
    out = {"score": ratio(grades), "judgements read": ratio([m is not None for m in found])}
    for kind in sorted({kind for q in questions for kind in q.extra["kinds"]}):
        here = np.array([kind in q.extra["kinds"] for q in questions])
        out[f"score, {kind}"] = ratio(grades * here, here)
    return out


# LLaVA-Bench in the wild

# Words of LLaVA llava/eval/table/rule.json.
WILD = (
    "We would like to request your feedback on the performance of two AI assistants in response to "
    "the user question displayed above. The user asks the question on observing an image. For your "
    "reference, the visual content in the image is represented with a few sentences describing the "
    "image. \nPlease rate the helpfulness, relevance, accuracy, level of details of their "
    "responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher "
    "score indicates better overall performance.\nPlease first output a single line containing "
    "only two values indicating the scores for Assistant 1 and 2, respectively. The two scores are "
    "separated by a space.\nIn the subsequent line, please provide a comprehensive explanation of "
    "your evaluation, avoiding any potential bias and ensuring that the order in which the "
    "responses were presented does not affect your judgment."
)


def read_wild(data: Data, options: Options) -> list[Question]:
    """questions.jsonl, context.jsonl and answers_gpt4.jsonl of LLaVA-Bench in the wild."""
    del options
    file = data.file("questions.jsonl")
    captions = _pairs(data.file("context.jsonl"), "image", "caption")
    known = _pairs(data.file("answers_gpt4.jsonl"), "question_id", "text")
    out = []
    for number, row in enumerate(read_lines(file), 1):
        where = f"{file} line {number}"
        id, image, asked, kind = text_fields(row, where, "question_id", "image", "text", "category")
        if image not in captions or id not in known:
            raise InputError(
                where,
                found="no context or no answer of GPT-4",
                expected="both, in context.jsonl and answers_gpt4.jsonl",
                fix="use the files as they are published",
            )
        out.append(
            Question(
                id=id,
                prompt=asked,
                images=(data.picture(image),),
                answers=(known[id],),
                cluster=image,
                extra={"context": captions[image], "kind": kind},
            )
        )
    return out


def _pairs(file: Path, *keys: str) -> dict[str, str]:
    """One text of each line by another."""
    rows = enumerate(read_lines(file), 1)
    return {
        key: text for n, row in rows for key, text in [text_fields(row, f"{file} line {n}", *keys)]
    }


def score_wild(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """100 x the model's scores / GPT-4's scores (LLaVA summarize_gpt_review.py), also by category.

    A review without two numbers in its first line counts for neither, and is counted.
    """
    asked = {
        q.id: _user(
            f"[Context]\n{q.extra['context']}\n\n[Question]\n{q.prompt}\n\n"
            f"[Assistant 1]\n{q.answers[0]}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n[System]\n{WILD}\n\n"
        )
        for q, text in zip(questions, texts, strict=True)
    }
    replies = _ask(options, asked)
    heads = [(replies[q.id].strip().split("\n") or [""])[0] for q in questions]
    pairs = [re.findall(r"\d+(?:\.\d+)?", head.replace(",", " ")) for head in heads]
    read = np.array([len(pair) == 2 for pair in pairs])
    theirs, ours = np.array([p if len(p) == 2 else (0, 0) for p in pairs], float).T
    out = {"relative score": ratio(ours, theirs), "judgements read": ratio(read)}
    for kind in dict.fromkeys(q.extra["kind"] for q in questions):
        here = np.array([q.extra["kind"] == kind for q in questions])
        out[f"relative score, {kind}"] = ratio(ours * here, theirs * here)
    return out


# MathVista

# After lupantech/MathVista evaluation/prompts/ext_ans.py, one example a type of answer.
EXTRACT = (
    "Please read the following example. Then extract the answer from the model response and type "
    "it at the end of the prompt.\n\n"
    "Hint: Please answer the question requiring an integer answer and provide the final value, "
    "e.g., 1, 2, 3, at the end.\nQuestion: Which number is missing?\n\n"
    "Model response: The number missing in the sequence is 14.\n\nExtracted answer: 14\n\n"
    "Hint: Please answer the question requiring a floating-point number with one decimal place and "
    "provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: What is the fraction of "
    "females facing the camera?\n\nModel response: The fraction of females facing the camera is "
    "0.6, which means that six out of ten females in the group are facing the camera.\n\n"
    "Extracted answer: 0.6\n\n"
    "Hint: Please answer the question requiring a floating-point number with two decimal places "
    "and provide the final value, e.g., 1.23, 1.34, 1.45, at the end.\nQuestion: How much money "
    "does Luca need to buy a sour apple candy and a butterscotch candy? (Unit: $)\n\n"
    "Model response: Luca needs $1.45 to buy a sour apple candy and a butterscotch candy.\n\n"
    "Extracted answer: 1.45\n\n"
    "Hint: Please answer the question requiring a Python list as an answer and provide the final "
    "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.\nQuestion: Between which two years does "
    "the line  graph saw its maximum peak?\n\nModel response: The line graph saw its maximum peak "
    "between 2007 and 2008.\n\nExtracted answer: [2007, 2008]\n\n"
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at "
    "the end.\nQuestion: What fraction of the shape is blue?\nChoices:\n(A) 3/11\n(B) 8/11\n"
    "(C) 6/11\n(D) 3/5\n\nModel response: The correct answer is (B) 8/11.\n\nExtracted answer: B"
)


def read_mathvista(data: Data, options: Options) -> list[Question]:
    """testmini.json: id -> image, query, answer, question_type, answer_type, choices, precision.

    `query` is the prompt: data/query.json of the repository, or the column of the published set.
    """
    del options
    file, out = data.file("testmini.json", "*.json"), []
    query = data.folder / "query.json"
    queries: object = read_json(query) if query.is_file() else {}
    for id, row in read_by_id(file).items():
        where = f"{file} {id}"
        if not row.get("query"):
            row["query"] = fields(queries, query, id)[0] if queries else None
        image, asked, answer = text_fields(row, where, "image", "query", "answer")
        kind, _ = text_fields(row, where, "question_type", "answer_type")
        row["choices"] = list(as_texts(row.get("choices") or [], where, "choices"))
        if kind == "multi_choice" and not row["choices"]:
            raise InputError(where, found="no choices", expected="some", fix="copy the file again")
        precision = row.get("precision")
        if precision is None or precision in ("", "nan") or precision != precision:  # pandas' none
            row["precision"] = None
        else:
            row["precision"] = integer(precision, where, "precision")
        out.append(
            Question(
                id=id,
                prompt=asked,
                images=(data.picture(image.removeprefix("images/"), "images"),),
                answers=(answer,),
                cluster=image,
                extra={key: row.get(key) for key in _TYPES},
            )
        )
    return out


_TYPES = ("question_type", "answer_type", "choices", "precision")


def extracted(text: str, kind: Mapping[str, Any]) -> str | None:
    """An answer that is one already, without a judge; None if it has to be looked for.

    MathVista evaluation/extract_answer.py.
    """
    if not text or kind["question_type"] == "multi_choice" and text in (kind["choices"] or ()):
        return text
    convert = {"integer": int, "float": float}.get(kind["answer_type"])
    if convert is None:
        return None
    try:
        return str(convert(text))
    except ValueError:
        return None


def normalised(text: str, kind: Mapping[str, Any]) -> str | None:
    """An extracted answer in the form of the labels (MathVista evaluation/calculate_score.py).

    The choice nearest to a text that is none is found by difflib, not by Levenshtein distance.
    """
    text = text.strip()
    if kind["question_type"] == "multi_choice":
        choices = list(kind["choices"])
        if letters := re.findall(r"\(([a-zA-Z])\)", text):
            text = letters[0].upper()
        if len(text) == 1 and 0 <= ord(text) - ord("A") < len(choices):
            return choices[ord(text) - ord("A")]
        return max(choices, key=lambda c: difflib.SequenceMatcher(None, text, c).ratio())
    try:
        if kind["answer_type"] == "integer":
            return str(int(float(text)))
        if kind["answer_type"] == "float":
            return str(round(float(text), int(kind["precision"] or 0)))
    except (ValueError, OverflowError):
        return None
    return text


def score_mathvista(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Accuracy; a judge extracts the answers that are not one already."""
    found = {q.id: extracted(t, q.extra) for q, t in zip(questions, texts, strict=True)}
    asked = {
        q.id: _user(f"{EXTRACT}\n\n{q.prompt}\n\n{text}\n\nExtracted answer: ")
        for q, text in zip(questions, texts, strict=True)
        if found[q.id] is None
    }
    replies = _ask(options, asked) if asked else {}
    answers = {id: replies[id] if text is None else text for id, text in found.items()}
    right = [bool(a := answers[q.id]) and normalised(a, q.extra) == q.answers[0] for q in questions]
    return {"accuracy": ratio(right)}


def _user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


def _ask(options: Options, asked: Mapping[str, Messages]) -> dict[str, str]:
    if options["judge"] is None:
        raise InputError(
            "config.judge",
            found="nothing",
            expected="the address of an OpenAI-compatible judge",
            fix="pass --config.judge=URL --config.judge_model=NAME, or --config.mode=predict",
        )
    return options["judge"](asked)


BENCHMARKS = {
    "mmvet": Benchmark(read_mmvet, score_mmvet, 1024, judged=True),
    "llava_wild": Benchmark(read_wild, score_wild, 1024, judged=True),
    "mathvista": Benchmark(read_mathvista, score_mathvista, 512, judged=True),
}
