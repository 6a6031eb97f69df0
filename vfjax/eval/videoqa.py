"""Questions about videos: MSVD-QA, MSRVTT-QA, ActivityNet-QA."""

import re
from collections.abc import Sequence
from pathlib import Path

from vfjax.errors import InputError
from vfjax.eval.data import Benchmark, Data, Options, Question, objects, read_json, text_fields
from vfjax.eval.judge import Messages
from vfjax.eval.stats import Metric, ratio

KINDS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".gif")

# Words of Video-ChatGPT's quantitative_evaluation/evaluate_activitynet_qa.py, as in lmms-eval.
_SYSTEM = (
    "You are an intelligent chatbot designed for evaluating the correctness of generative outputs "
    "for question-answer pairs. Your task is to compare the predicted answer with the correct "
    "answer and determine if they match meaningfully. Here's how you can accomplish the task:"
    "------##INSTRUCTIONS: - Focus on the meaningful match between the predicted answer and the "
    "correct answer.\n- Consider synonyms or paraphrases as valid matches.\n- Evaluate the "
    "correctness of the prediction compared to the answer."
)
_USER = (
    "Please evaluate the following video-based question-answer pair:\n\nQuestion: {question}\n"
    "Correct Answer: {answer}\nPredicted Answer: {said}\n\n"
    "Provide your evaluation only as a yes/no and score where the score is an integer value "
    "between 0 and 5, with 5 indicating the highest meaningful match. Please generate the response "
    "in the form of a Python dictionary string with keys 'pred' and 'score', where value of 'pred' "
    "is  a string of 'yes' or 'no' and value of 'score' is in INTEGER, not STRING.DO NOT PROVIDE "
    "ANY OTHER OUTPUT TEXT OR EXPLANATION. Only provide the Python dictionary string. For example, "
    "your response should look like this: {{'pred': 'yes', 'score': 4.8}}."
)
_PRED = re.compile(r"['\"]pred['\"]\s*:\s*['\"](yes|no)['\"]", re.I)
_SCORE = re.compile(r"['\"]score['\"]\s*:\s*['\"]?(\d+(?:\.\d+)?)")


def read_videos(data: Data, options: Options) -> list[Question]:
    """`*_q.json` (video_name, question, question_id) and `*_a.json` (answer, question_id).

    The form of activitynet-qa and of Video-LLaVA's MSVD and MSRVTT. Videos lie in `videos`, named
    with or without `v_` in front and an ending.
    """
    del options
    file = data.file("test_q.json", "*_q.json")
    path = file.with_name(file.name.replace("_q.json", "_a.json"))
    answers: dict[str, str] = {}
    for number, row in enumerate(objects(read_json(path), path, "the file")):
        id, answer = text_fields(row, f"{path} answer {number}", "question_id", "answer")
        answers[id] = answer
    out = []
    for number, row in enumerate(objects(read_json(file), file, "the file")):
        where = f"{file} question {number}"
        id, asked = text_fields(row, where, "question_id", "question")
        (name,) = text_fields(row, where, "video_name" if "video_name" in row else "video")
        if id not in answers:
            raise InputError(
                path, found=f"no answer to {id}", expected="one", fix="copy the file again"
            )
        out.append(
            Question(
                id=id,
                prompt=asked,
                video=_video(data.picture(name, "videos")),
                answers=(answers[id],),
                cluster=name,
            )
        )
    return out


def _video(path: Path) -> Path:
    """The file of that name; its name as it is if there is none."""
    names = (path, path.with_name(f"v_{path.name}"))
    tried = [p for stem in names for p in (stem, *(Path(f"{stem}{kind}") for kind in KINDS))]
    return next((p for p in tried if p.is_file()), path)


def score_videos(
    questions: Sequence[Question], texts: Sequence[str], options: Options
) -> dict[str, Metric]:
    """A judge's yes (accuracy) and its score, 0 to 5; without a judge, exact match only.

    Exact match compares words in lower case without a last full stop; it is not what papers report.
    """
    pairs = list(zip(questions, texts, strict=True))
    same = [t.strip().rstrip(".").lower() == q.answers[0].lower() for q, t in pairs]
    out = {"exact match": ratio(same)}
    if options["judge"] is None:
        return out
    asked: dict[str, Messages] = {
        q.id: [
            {"role": "system", "content": _SYSTEM},
            {
                "role": "user",
                "content": _USER.format(question=q.prompt, answer=q.answers[0], said=text),
            },
        ]
        for q, text in pairs
    }
    replies = options["judge"](asked)
    read = [_judgement(replies[q.id]) for q in questions]
    return out | {
        "accuracy": ratio([r is not None and r[0] for r in read]),
        "score": ratio([r[1] if r else 0.0 for r in read], scale=1.0),
        "judgements read": ratio([r is not None for r in read]),
    }


def _judgement(reply: str) -> tuple[bool, float] | None:
    """Yes or no, and the score, in any order; None if one is absent or above 5."""
    pred, score = _PRED.search(reply), _SCORE.search(reply)
    if pred is None or score is None or float(score[1]) > 5:
        return None
    return pred[1].lower() == "yes", float(score[1])


BENCHMARKS = {
    name: Benchmark(read_videos, score_videos, 128, judged=True)
    for name in ("msvd", "msrvtt", "activitynet")
}
