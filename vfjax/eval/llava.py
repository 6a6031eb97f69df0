"""Any questions in LLaVA's form: JSONL in, LLaVA's answers JSONL out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vfjax.atomic import replacing
from vfjax.eval.data import Benchmark, Data, Options, Question, as_texts, read_lines, text_fields


def read_llava(data: Data, options: Options) -> list[Question]:
    """Lines of question_id, text and image (a name, several, or none), as model_vqa.py reads.

    The words are asked as they stand, but for a placeholder, which LLaVA's own files don't have.
    """
    del options
    file, out = data.file("questions.jsonl", "*.jsonl"), []
    for number, row in enumerate(read_lines(file), 1):
        where = f"{file} line {number}"
        id, asked = text_fields(row, where, "question_id", "text")
        images = row.get("image") or []
        names = as_texts([images] if isinstance(images, str) else images, where, "image")
        out.append(
            Question(
                id=id,
                prompt=asked,
                images=tuple(data.picture(name) for name in names),
                cluster=names[0] if names else id,
                extra={"question_id": row["question_id"]},
            )
        )
    return out


def write_answers(
    path: Path, questions: Sequence[Question], texts: Mapping[str, str], model: str
) -> None:
    """LLaVA's answers file (llava/eval/model_vqa.py), whole or not at all.

    Its answer_id is a random short UUID; here it is 22 characters of a hash of the line, so that
    the same answers make the same file.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question in questions:
            text = texts[question.id]
            id = question.extra.get("question_id", question.id)
            key = json.dumps([id, question.prompt, text, model])
            row = {
                "question_id": id,
                "prompt": question.prompt,
                "text": text,
                "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
                "model_id": model,
                "metadata": {},
            }
            file.write(json.dumps(row) + "\n")


BENCHMARKS = {"llava": Benchmark(read_llava, None, 1024)}
