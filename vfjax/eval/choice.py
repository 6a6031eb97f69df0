"""Questions with options: MMVP, ScienceQA, SEED-Bench, MMBench."""

import base64
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vfjax.errors import InputError
from vfjax.eval.data import (
    Benchmark,
    Data,
    Options,
    Picture,
    Question,
    as_text,
    fields,
    integer,
    labelled,
    objects,
    read_by_id,
    read_lines,
    read_object,
    read_table,
    text_fields,
)
from vfjax.eval.stats import Metric, ratio
from vfjax.eval.yesno import in_clusters

LETTER = "\nAnswer with the option's letter from the given choices directly."
"""What LLaVA-1.5 puts behind questions with options (docs/Evaluation.md)."""

LETTERS = string.ascii_uppercase

MMVP_CORRECTED = {99: "(b)", 100: "(a)", 279: "(b)", 280: "(a)"}
"""Labels that were the wrong way round (github.com/tsb0601/MMVP/issues/30; lmms-eval, too)."""

_RULES = [
    re.compile(rule, re.IGNORECASE)
    for rule in (
        r"^\(([a-z])\)",
        r"^([a-z])(?:[.:),]|$)",
        r"answer is:? ?\(?([a-z])(?:[.:),]|$)",
        r"option \(?([a-z])(?:[.:),]|$)",
    )
]


def choose(text: str, options: Mapping[str, str]) -> str:
    """The letter of the option that an answer means; "" if it is none, or open to doubt.

    A letter at the start or after "answer is"; or an option's words alone; or one option's letter
    among the words (VLMEvalKit's vlmeval/utils/matching_util.py); or the words of exactly one.

    Args:
        text: the answer.
        options: upper-case letter -> words.
    """
    text = text.strip()
    for rule in _RULES:
        if (found := rule.search(text)) and found[1].upper() in options:
            return found[1].upper()
    said = text.casefold().rstrip(".")
    words = {letter: option.casefold().rstrip(".") for letter, option in options.items()}
    same = [letter for letter, option in words.items() if option == said]
    inside = [
        letter
        for letter, option in words.items()
        if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)
    ]
    letters = [] if same else _letters(text, options)
    if letters == ["A"] and len(inside) == 1:  # "A dog" may well be an option's words
        letters = []
    found_in = same or letters or inside
    return found_in[0] if len(found_in) == 1 else ""


def _letters(text: str, options: Mapping[str, str]) -> list[str]:
    """Options whose letter is a word, in upper case; not an article or pronoun, by its place."""
    words = re.sub(r"[^\w\s]", " ", text).split()
    found = set()
    for i, word in enumerate(words):
        named = i + 1 == len(words) or (i and words[i - 1].casefold() in ("answer", "option", "is"))
        if word in options and (word not in "AI" or named):
            found.add(word)
    return sorted(found)


def named_options(choices: Sequence[Any], where: object) -> dict[str, str]:
    """Options under their letters.

    Raises:
        InputError: there are none, or more than letters.
    """
    if not isinstance(choices, list | tuple) or not 1 <= len(choices) <= len(LETTERS):
        raise InputError(
            where,
            found=f"options {ascii(choices)[:60]}",
            expected=f"a list of 1 to {len(LETTERS)}",
            fix="use the file as it is published",
        )
    return dict(zip(LETTERS, map(str, choices), strict=False))


def _labelled(answer: object, options: Mapping[str, str], where: object) -> str:
    """An answer's letter; raises InputError if it is of no option."""
    letter = str(answer).strip(" ()").upper()
    if letter not in options:
        raise InputError(
            where,
            found=f"answer {ascii(answer)[:60]}",
            expected=f"one of {', '.join(options)}",
            fix="use the file as it is published",
        )
    return letter


def listed(options: Mapping[str, str]) -> str:
    """Options as lines of `A. words`."""
    return "".join(f"\n{letter}. {words}" for letter, words in options.items())


READ = "option read"
"""Metric: share of the answers that `choose` reads an option from; the others count as wrong."""


def _right(questions: Sequence[Question], texts: Sequence[str]) -> tuple[np.ndarray, Metric]:
    """float64[n], whether the right option was chosen; and `READ`."""
    pairs = zip(questions, texts, strict=True)
    chosen = [choose(text, question.extra["options"]) for question, text in pairs]
    right = [float(c == q.answers[0]) for c, q in zip(chosen, questions, strict=True)]
    return np.array(right), ratio(np.array([float(c != "") for c in chosen]))


# MMVP


def read_mmvp(data: Data, options: Options) -> list[Question]:
    """MMVP's `Questions.csv` and `MMVP Images`, or `questions.jsonl` with the same columns.

    The prompt is question and options in one line (tsb0601/MMVP scripts/evaluate_mllm.py).
    Questions 2k - 1 and 2k are a pair. Four labels are corrected unless `original_labels`.
    """
    file, rows = data.file("Questions.csv", "questions.jsonl"), []
    table = read_table(file, ",") if file.suffix == ".csv" else read_lines(file)
    for number, row in enumerate(table, 1):
        names = ("Index", "Question", "Options", "Correct Answer")
        if file.suffix != ".csv":
            names = ("index", "question", "options", "answer")
        where = f"{file} row {number}"
        _, asked, choices, answer = text_fields(row, where, *names)
        index, named = integer(row[names[0]], where, names[0]), _inline(choices)
        if not options["original_labels"]:
            answer = MMVP_CORRECTED.get(index, answer)
        image = Path(as_text(row.get("image") or f"{index}.jpg", where, "image")).name
        rows.append(
            Question(
                id=str(index),
                prompt=f"{asked} {choices}{LETTER}",
                images=(data.picture(image, "MMVP Images"),),
                answers=(_labelled(answer, named, where),),
                cluster=f"pair {(index - 1) // 2}",
                extra={"options": named},
            )
        )
    return rows


def _inline(choices: str) -> dict[str, str]:
    """Letter -> words of "(a) Open (b) Closed", the letters in their order."""
    ends, at = list[int](), -1
    for letter in string.ascii_lowercase:
        if (at := choices.find(f"({letter})", at + 1)) < 0:
            break
        ends.append(at)
    spans = zip(ends, [*ends[1:], len(choices)], strict=False)  # of none, none
    return {LETTERS[k]: choices[first + 3 : end].strip() for k, (first, end) in enumerate(spans)}


def score_mmvp(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Share of right answers, and of pairs with both right (arXiv 2401.06209, section 2).

    The authors have GPT-4 compare answer and label; here it is `choose`.
    """
    del options
    right, read = _right(questions, texts)
    both, first = in_clusters(questions, right)
    return {"accuracy": ratio(right), "pair accuracy": ratio(both, first), READ: read}


# ScienceQA


def read_scienceqa(data: Data, options: Options) -> list[Question]:
    """ScienceQA's `problems.json`; pictures are images/SPLIT/ID/image.png.

    `split` is "test", "val" or "train". The prompt is LLaVA-1.5's (llava_test_CQM-A.json).
    """
    file, out = data.file("problems.json"), []
    for id, row in read_by_id(file).items():
        if row.get("split", options["split"]) != options["split"]:
            continue
        where = f"{file} {id}"
        (asked,) = text_fields(row, where, "question")
        choices, answer = fields(row, where, "choices", "answer")
        named = named_options(choices, where)
        number = integer(answer, where, "answer")
        letter = LETTERS[number] if 0 <= number < len(LETTERS) else answer
        hint, image = (as_text(row.get(key) or "", where, key) for key in ("hint", "image"))
        hint = hint and f"Context: {hint}\n"
        picture = data.picture(f"{options['split']}/{id}/{image}", "images") if image else None
        out.append(
            Question(
                id=id,
                prompt=f"{hint}{asked}{listed(named)}{LETTER}",
                images=(picture,) if picture else (),
                answers=(_labelled(letter, named, where),),
                cluster=id,
                extra={"options": named},
            )
        )
    return out


def scienceqa_letter(text: str) -> str:
    """The letter of "A", "A. ..." or "The answer is A."; else "" (LLaVA eval_science_qa.py)."""
    text = text.strip()
    if len(text) == 1:
        return text
    if text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else ""


def score_scienceqa(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Accuracy of all questions, and of those with a picture (ScienceQA-IMG)."""
    del options
    pairs = list(zip(questions, texts, strict=True))
    right = np.array([scienceqa_letter(t) == q.answers[0] for q, t in pairs], float)
    seen = np.array([bool(q.images) for q in questions])
    return {"accuracy": ratio(right), "accuracy, with picture": ratio(right * seen, seen)}


# SEED-Bench


def read_seed(data: Data, options: Options) -> list[Question]:
    """SEED-Bench.json; questions about pictures only, as in LLaVA's "SEED-IMG"."""
    del options
    file, out = data.file("SEED-Bench.json", "*.json"), []
    whole = read_object(file, "questions")
    (rows,) = fields(whole, file, "questions")
    (types,) = objects([whole.get("question_type", {})], file, "question_type")
    kinds = {str(number): name for name, number in types.items()}
    for number, row in enumerate(objects(rows, file, "questions")):
        if row.get("data_type", "image") != "image":
            continue
        where = f"{file} question {number}"
        id, asked, answer, image = text_fields(
            row, where, "question_id", "question", "answer", "data_id"
        )
        fields(row, where, "choice_a", "choice_b")
        choices = {letter: row.get(f"choice_{letter.lower()}") for letter in LETTERS}
        named = {letter: str(option) for letter, option in choices.items() if option is not None}
        kind = str(row.get("question_type_id", ""))
        out.append(
            Question(
                id=id,
                prompt=f"{asked}{listed(named)}{LETTER}",
                images=(data.picture(image, "SEED-Bench-image"),),
                answers=(_labelled(answer, named, where),),
                cluster=image,
                extra={"options": named, "kind": kinds.get(kind, kind)},
            )
        )
    return out


def score_kinds(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Accuracy, over all and by kind of question."""
    del options
    right, read = _right(questions, texts)
    out = {"accuracy": ratio(right), READ: read}
    for kind in dict.fromkeys(q.extra["kind"] for q in questions):
        here = np.array([q.extra["kind"] == kind for q in questions])
        out[f"accuracy, {kind}"] = ratio(right * here, here)
    return out


# MMBench

ROTATION = 1_000_000
"""MMBench's k-th rotation of a question has its index plus k times this."""


def read_mmbench(data: Data, options: Options) -> list[Question]:
    """A TSV with pictures in base64, rotations of a question as rows of their own.

    The prompt is LLaVA-1.5's (llava/eval/model_vqa_mmbench.py); `chinese` asks for the letter in
    Chinese.
    """
    file, out = data.file("*.tsv"), []
    rows = read_table(file, "\t")
    places = [f"{file} row {number}" for number in range(1, len(rows) + 1)]
    asked = [
        fields(row, where, "index", "question") for row, where in zip(rows, places, strict=True)
    ]
    ids = [integer(id, where, "index") for (id, _), where in zip(asked, places, strict=True)]
    pictures = {
        id: row["image"]
        for id, row in zip(ids, rows, strict=True)
        if len(row.get("image") or "") > 64
    }
    decoded: dict[str, bytes] = {}
    suffix = "\n请直接回答选项字母。" if options["chinese"] else LETTER
    for id, (_, words), row, where in zip(ids, asked, rows, places, strict=True):
        named = {letter: row[letter] for letter in LETTERS if _given(row.get(letter))}
        hint = f"{row['hint']}\n" if _given(row.get("hint")) else ""
        base, answer = id % ROTATION, row.get("answer")
        encoded = pictures.get(id)
        if encoded is None and _given(row.get("image")):  # the index of another row
            encoded = pictures.get(integer(row["image"], where, "image"))
        encoded = encoded or pictures.get(base)
        out.append(
            Question(
                id=str(id),
                prompt=f"{hint}{words}{listed(named)}{suffix}",
                images=(_decoded(encoded, decoded, where),),
                answers=(_labelled(answer, named, where),) if _given(answer) else (),
                cluster=str(base),
                extra={"options": named, "kind": row.get("category") or ""},
            )
        )
    return out


def _given(value: str | None) -> bool:
    return bool(value and value.lower() not in ("nan", "none"))


def _decoded(encoded: str | None, known: dict[str, bytes], where: str) -> Picture:
    """A picture's bytes; rotations share them."""
    if encoded is None:
        raise InputError(
            where,
            found="no picture",
            expected="one in base64, here or in its first rotation's row",
            fix="use the file as it is published",
        )
    try:
        return known.setdefault(encoded, base64.b64decode(encoded, validate=True))
    except ValueError:
        raise InputError(
            where, found="no base64", expected="a picture in base64", fix="copy the file again"
        ) from None


def score_mmbench(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Share of questions that are right in all their rotations (arXiv 2307.06281, section 4.1).

    Options are found by `choose`, which asks no LLM. Also the share of right rows.
    """
    del options
    labelled(questions)
    right, read = _right(questions, texts)
    whole, first = in_clusters(questions, right)
    out = {"circular accuracy": ratio(whole, first), "accuracy of rows": ratio(right), READ: read}
    for kind in dict.fromkeys(q.extra["kind"] for q in questions):
        here = np.array([q.extra["kind"] == kind for q in questions])
        out[f"circular accuracy, {kind}"] = ratio(whole * here, first * here)
    return out


BENCHMARKS = {
    "mmvp": Benchmark(read_mmvp, score_mmvp, 1024, {"original_labels": False}),
    "scienceqa": Benchmark(read_scienceqa, score_scienceqa, 1024, {"split": "test"}),
    "seed": Benchmark(read_seed, score_kinds),
    "mmbench": Benchmark(read_mmbench, score_mmbench, 1024, {"chinese": False}),
}
