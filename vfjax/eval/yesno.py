"""Questions that are answered yes or no: POPE and MME."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vfjax.errors import InputError, counted
from vfjax.eval.data import (
    Benchmark,
    Data,
    Options,
    Question,
    as_text,
    read_lines,
    read_text,
    text_fields,
)
from vfjax.eval.extras import needs
from vfjax.eval.stats import Metric, ratio, total

SHORT = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 puts behind questions with short answers (docs/Evaluation.md)."""

SPLITS = ("random", "popular", "adversarial")


def read_pope(data: Data, options: Options) -> list[Question]:
    """POPE's `coco_pope_{split}.json`; pictures are COCO's val2014."""
    del options
    out = []
    for file in data.files("*_pope_[rpa]*.json*"):
        for number, row in enumerate(read_lines(file), 1):
            where = f"{file} row {number}"
            id, image, text, label = text_fields(
                row, where, "question_id", "image", "text", "label"
            )
            if label not in ("yes", "no"):
                raise InputError(where, found=f"label {label!r}", expected="yes or no", fix="mend")
            split = as_text(row.get("category") or "", where, "category")
            split = split or next((s for s in SPLITS if s in file.stem), file.stem)
            out.append(
                Question(
                    id=f"{split}/{id}",
                    prompt=text + SHORT,
                    images=(data.picture(image, "val2014"),),
                    answers=(label,),
                    cluster=image,
                    extra={"split": split},
                )
            )
    return out


def says_no(text: str) -> bool:
    """POPE's rule: no, not or No is a word of the first sentence; all else is a yes.

    RUCAIBox/POPE evaluate.py; LLaVA llava/eval/eval_pope.py.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.isdisjoint(words)


def score_pope(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Accuracy, precision, recall, F1 and share of yes of each split, "yes" being the positive.

    LLaVA's papers report the mean F1 of the splits, others the mean accuracy: both are given.
    """
    del options
    sklearn = needs("sklearn.metrics", "eval", "scikit-learn")
    truth = np.array([q.answers[0] == "yes" for q in questions])
    said = np.array([not says_no(text) for text in texts])
    splits = list(dict.fromkeys(q.extra["split"] for q in questions))
    out: dict[str, Metric] = {}
    for split in splits:
        here = np.array([q.extra["split"] == split for q in questions])
        precision, recall, f1, _ = sklearn.precision_recall_fscore_support(
            truth[here], said[here], average="binary", zero_division=0
        )
        accuracy = sklearn.accuracy_score(truth[here], said[here])
        both = here & truth & said
        yes, right = here & said, here & (truth == said)
        out |= {
            f"accuracy, {split}": ratio(right, here, value=100 * accuracy),
            f"precision, {split}": ratio(both, yes, value=100 * precision),
            f"recall, {split}": ratio(both, here & truth, value=100 * recall),
            f"F1, {split}": ratio(2 * both, yes + 1.0 * (here & truth), value=100 * f1),
            f"yes, {split}": ratio(yes, here),
        }
    if len(splits) > 1:
        for kind in ("accuracy", "F1"):
            each = [out[f"{kind}, {split}"] for split in splits]
            out[f"{kind}, mean of splits"] = total(each, mean=True)
    return out


def read_mme(data: Data, options: Options) -> list[Question]:
    """MME's release: a folder a subtask, with ID.txt beside ID.jpg, or in two folders.

    A line of ID.txt is a question, a tab, and Yes or No.
    """
    del options
    out = []
    for file in data.files("*/**/*.txt"):
        folder = file.parent
        pictures = folder
        if folder.name == "questions_answers_YN":
            folder, pictures = folder.parent, folder.parent / "images"
        if data.pictures is not None:
            pictures = data.pictures / folder.name
        out += _mme_questions(file, folder.name, pictures)
    return out


def _mme_questions(file: Path, subtask: str, pictures: Path) -> list[Question]:
    """The two questions of a picture."""
    out = []
    lines = [line for line in re.split(r"\r\n|\r|\n", read_text(file)) if line.strip()]
    image = next((p for s in (".jpg", ".png") if (p := pictures / (file.stem + s)).is_file()), None)
    for number, line in enumerate(lines, 1):
        asked, _, answer = line.rpartition("\t")
        answer = answer.strip().rstrip(".")
        if len(lines) != 2 or not asked or answer not in ("Yes", "No"):
            raise InputError(
                f"{file} line {number}",
                found=f"{ascii(line[:60])}, of {counted(len(lines), 'line')}",
                expected="two lines of a question, a tab, and Yes or No",
                fix="use the file as it is published",
            )
        out.append(
            Question(
                id=f"{subtask}/{file.stem}/{number}",
                prompt=asked.replace(" Please answer yes or no.", "").strip() + SHORT,
                images=(image or pictures / f"{file.stem}.jpg",),
                answers=(answer,),
                cluster=f"{subtask}/{file.stem}",
                extra={"subtask": subtask},
            )
        )
    return out


def score_mme(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """Each subtask's accuracy plus accuracy+ (at most 200), and the sums of both groups.

    Accuracy+ is the share of pictures with both questions right. By lmms-eval.
    """
    del options
    mme = needs("lmms_eval.tasks.mme.utils", "lmms-eval", "lmms-eval")
    groups: dict[str, list[dict[str, Any]]] = {}
    records: dict[str, list[dict[str, Any]]] = {}
    right = np.zeros(len(questions))
    for i, (q, text) in enumerate(zip(questions, texts, strict=True)):
        doc = {
            "answer": q.answers[0],
            "category": q.extra["subtask"],
            "question_id": q.cluster,
        }
        ((key, record),) = mme.mme_process_results(doc, [text]).items()
        name = "perception" if key == "mme_perception_score" else "cognition"
        groups.setdefault(name, []).append(record)
        records.setdefault(f"{name}, {q.extra['subtask']}", []).append(record)
        right[i] = record["score"]
    both, first = in_clusters(questions, right)
    out = {}
    for name, rows in records.items():
        here = np.array([name.endswith(f", {q.extra['subtask']}") for q in questions])
        parts = [ratio(right * here, here), ratio(both * here, first * here)]
        out[name] = total(parts, value=mme.mme_aggregate_results(rows))
    for name, rows in groups.items():
        parts = [metric for key, metric in out.items() if key.startswith(f"{name}, ")]
        out[name] = total(parts, value=mme.mme_aggregate_results(rows))
    return out


def in_clusters(questions: Sequence[Question], right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether all of a cluster is right, float64[n], and bool[n], both at its first question."""
    members: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        members.setdefault(question.cluster, []).append(i)
    both, first = np.zeros(len(questions)), np.zeros(len(questions), bool)
    for rows in members.values():
        both[rows[0]], first[rows[0]] = right[rows].all(), True
    return both, first


BENCHMARKS = {
    "pope": Benchmark(read_pope, score_pope),
    "mme": Benchmark(read_mme, score_mme),
}
