"""Benchmarks: questions from local files, a model's answers, scores with intervals.

Not imported by `vfjax` itself. What scores comes from libraries that are imported when it is needed
(extras "eval" and "lmms-eval").
"""

from collections.abc import Mapping

from vfjax.errors import InputError
from vfjax.eval import boxes, captions, choice, judged, llava, log, videoqa, vqa, yesno
from vfjax.eval.data import Benchmark, Data, Options, Question, check, check_pictures, digest, first
from vfjax.eval.judge import Judge
from vfjax.eval.predict import predict
from vfjax.eval.stats import Metric, intervals, paired

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Data",
    "Judge",
    "Metric",
    "Question",
    "check_pictures",
    "digest",
    "get_benchmark",
    "intervals",
    "log",
    "paired",
    "predict",
    "read",
]

BENCHMARKS: Mapping[str, Benchmark] = {
    **llava.BENCHMARKS,
    **choice.BENCHMARKS,
    **yesno.BENCHMARKS,
    **vqa.BENCHMARKS,
    **boxes.BENCHMARKS,
    **captions.BENCHMARKS,
    **videoqa.BENCHMARKS,
    **judged.BENCHMARKS,
}


def get_benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        InputError: there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise InputError(
            "config.benchmark",
            found=repr(name),
            expected=f"one of {', '.join(BENCHMARKS)}",
            fix="correct it",
        )
    return BENCHMARKS[name]


def read(
    benchmark: Benchmark, data: Data, options: Options, limit: int | None = None
) -> list[Question]:
    """A benchmark's questions, with ids of their own; with a limit the first of them, see `first`.

    Raises:
        InputError: a missing file, column or id, no question, or one id twice.
    """
    questions = benchmark.read(data, options)
    check(questions, data.path)
    return first(questions, limit)
