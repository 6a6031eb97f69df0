"""Asks a model a benchmark's questions, scores its answers, says how sure the scores are."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

import converters
from converters.export import to_bytes
from converters.files import hub
from converters.files.checksums import audit_source
from converters.files.paths import sha256, stand_in
from experiments.tasks.common import FAMILY, check_config, load, named, required
from vfjax import InputError
from vfjax.atomic import findable, replacing
from vfjax.errors import counted
from vfjax.eval import (
    Benchmark,
    Data,
    Judge,
    Metric,
    Question,
    check_pictures,
    digest,
    get_benchmark,
    intervals,
    log,
    paired,
    predict,
    read,
)
from vfjax.eval.llava import write_answers
from vfjax.processes import agreeing, together

MODES = ("all", "predict", "score")
MEMBERS = ("clip", "dino")
"""Of the shipped family, fused where no model is named."""


def run(config: ConfigDict, workdir: Path) -> None:
    benchmark = get_benchmark(config.benchmark)
    required(config, "data")
    _check(config)
    with agreeing("evaluate", folder=workdir) as facts:
        data = Data(stand_in(config.data), stand_in(config.images) if config.images else None)
        questions = read(benchmark, data, config.options, config.limit)
        header: log.Header = {"benchmark": config.benchmark, "questions": digest(questions)}
        facts |= header
    if config.mode != "score":
        workdir.mkdir(parents=True, exist_ok=True)
        header = answer(config, benchmark, questions, header, workdir)
    if config.chunks > 1 and config.mode != "score":
        print(f"chunk {config.chunk} is answered; when all are, pass --config.mode=score")
    elif jax.process_index() == 0:
        header, texts = collect(config, questions, header, workdir)
        if config.mode != "predict":
            finish(config, benchmark, questions, header, texts, workdir)


def _check(config: ConfigDict) -> None:
    limits = config.chunks >= 1 and 0 <= config.chunk < config.chunks
    check_config(
        config,
        ("mode", config.mode in MODES, " or ".join(MODES)),
        ("chunk", limits, f"0 to chunks - 1, of {config.chunks}"),
        ("limit", config.limit is None or config.limit > 0, "at least 1"),
        ("constant", not (config.constant and config.model), "no model beside it"),
    )


# Answers


def answer(
    config: ConfigDict,
    benchmark: Benchmark,
    questions: Sequence[Question],
    header: log.Header,
    workdir: Path,
) -> log.Header:
    """Asks what is not answered yet; returns what the answers depend on."""
    if config.constant is not None:
        header = {**header, "model": "constant", "text": config.constant}
        log.read_parts(workdir, header)
        if jax.process_index() == 0:
            log.join(workdir, header, {q.id: config.constant for q in questions})
        return header
    check_pictures(questions)
    folder = hub.folder(config.model, "config.model") if config.model else shipped(workdir)
    source = converters.open_source(folder, towers=named("towers", config.towers))
    sums = audit_source(source)
    model, processor = load(config, folder)
    processor.template = config.template or processor.template
    length = config.max_new_tokens or benchmark.max_new_tokens
    header = {
        **header,
        "model": model_id(folder),
        "weights": hashlib.sha256("".join(sums.values()).encode()).hexdigest(),
        "config": config_digest(folder),
        "dtype": config.dtype,
        "batch": config.batch,  # in bfloat16 another batch or mesh may turn a token
        "mesh": list(config.mesh) if config.mesh else None,
        "template": processor.template,
        "max_new_tokens": length,
        "video": [config.frames, config.pool],
        "int8": [config.int8, config.int8_cache],
        "prune": json.loads(config.prune.to_json()) if config.prune.keep else None,
    }
    with agreeing("answer") as facts:
        facts |= header
    with progress(questions, config) as advance:
        predict(
            model,
            processor,
            questions,
            workdir,
            header,
            batch=config.batch,
            max_new_tokens=length,
            chunk=share(config),
            writes=not config.mesh or jax.process_index() == 0,
            frames=config.frames,
            pool=config.pool,
            progress=advance,
            together=wait,
        )
    wait("answers are written")
    return header


def share(config: ConfigDict) -> tuple[int, int]:
    """This process's chunk, of how many: processes without a common mesh share out a job's."""
    if config.mesh:
        return config.chunk, config.chunks
    count = jax.process_count()
    return config.chunk * count + jax.process_index(), config.chunks * count


def wait(what: str) -> None:
    """Waits for the other processes, if there are any."""
    with together(what):
        pass


def shipped(workdir: Path) -> Path:
    """The shipped family's fused model, in WORKDIR."""
    folder = workdir / "shipped-fused"  # "fused" may be another task's
    with together("fuse the family"):
        if jax.process_index() == 0 and not folder.is_dir():
            members = {name: FAMILY / name for name in MEMBERS}
            weights = (1 / len(MEMBERS),) * len(MEMBERS)
            converters.fuse(members, folder, base=FAMILY / "base", params={"weights": weights})
    return folder


def model_id(folder: Path) -> str:
    """A model's name, as LLaVA has it: the last part of its path, two if that is a checkpoint's.

    Of one from the hub it is the repository's.
    """
    repository = (hub.named(folder) or "").partition("@")[0]
    *_, above, last = ("", *(Path(repository) if repository else folder.resolve()).parts)
    return f"{above}_{last}" if last.startswith("checkpoint-") else last


def config_digest(folder: Path) -> str:
    """SHA-256 of what a model's answers depend on beside weights: configs, tokenizer, templates."""
    kinds, total = {".json", ".model", ".txt", ".jinja"}, hashlib.sha256()
    for path in sorted(x for x in folder.iterdir() if x.suffix in kinds and x.is_file()):
        total.update(f"{path.name} {sha256(path)}\n".encode())
    return total.hexdigest()


@contextmanager
def progress(questions: Sequence[Question], config: ConfigDict) -> Iterator[Any]:
    """A progress bar of questions, where stderr is a terminal."""
    total = len(questions) // (config.chunks * (1 if config.mesh else jax.process_count()))
    with tqdm(desc=config.benchmark, unit="question", total=total, disable=None) as shown:
        yield shown.update


# Scores


def collect(
    config: ConfigDict, questions: Sequence[Question], header: log.Header, workdir: Path
) -> tuple[log.Header, dict[str, str]]:
    """What the answers depend on, and the answers by id, joined to one file."""
    if "model" not in header:  # only scored: whatever model has answered
        headers = [own for path in log.parts(workdir) if (own := log.read(path)[0])]
        if not headers:
            raise InputError(
                workdir, found="no predictions", expected=log.NAME, fix="pass --config.mode=all"
            )
        header = {**headers[0], **header}
    texts = log.read_parts(workdir, header)
    answered(questions, texts, workdir)
    file = log.join(workdir, header, {q.id: texts[q.id] for q in questions})
    print(f"{file}: {counted(len(questions), 'answer')}")
    return header, texts


def answered(questions: Sequence[Question], texts: dict[str, str], where: object) -> None:
    """Raises InputError unless all are."""
    if missing := sum(q.id not in texts for q in questions):
        raise InputError(
            where,
            found=f"no answer to {missing:,} of {counted(len(questions), 'question')}",
            expected="answers to all",
            fix="run that command again with --config.mode=all; it goes on",
        )


def finish(
    config: ConfigDict,
    benchmark: Benchmark,
    questions: Sequence[Question],
    header: log.Header,
    texts: dict[str, str],
    workdir: Path,
) -> None:
    """Writes and prints the scores; or writes LLaVA's answers, for which there are none."""
    if benchmark.score is None:
        out = workdir / "answers.jsonl"
        write_answers(out, questions, texts, str(header["model"]))
        print(f"{out}: in LLaVA's form")
        return
    metrics = scored(config, benchmark, questions, texts, header, workdir)
    clusters = [q.cluster for q in questions]
    found_in = intervals(metrics, clusters, seed=config.seed)
    record: dict[str, Any] = {
        "settings": dict(header),
        "count": len(questions),
        "clusters": len(set(clusters)),
        "metrics": {name: _row(m, found_in.get(name)) for name, m in metrics.items()},
    }
    if config.against:
        record["against"] = compare(config, benchmark, questions, metrics, header)
    with replacing(workdir / "results.json") as part:
        part.write_bytes(to_bytes(record))
    print(table(record))


def scored(
    config: ConfigDict,
    benchmark: Benchmark,
    questions: Sequence[Question],
    texts: dict[str, str],
    header: log.Header,
    workdir: Path,
) -> dict[str, Metric]:
    """The metrics, with a judge if there is one."""
    assert benchmark.score is not None
    options = config.options.to_dict()
    if benchmark.judged:
        options["judge"] = None
        if config.judge:
            key = os.environ.get("OPENAI_API_KEY", "none")
            judge = Judge(config.judge, config.judge_model, key, workdir / "judge.jsonl")
            options["judge"] = lambda asked: judge.ask(asked, header)
    return benchmark.score(questions, [texts[q.id] for q in questions], options)


def compare(
    config: ConfigDict,
    benchmark: Benchmark,
    questions: Sequence[Question],
    metrics: dict[str, Metric],
    header: log.Header,
) -> dict[str, Any]:
    """Differences to another model's answers to the same questions."""
    against = findable(config.against)
    other, texts = log.read(against)
    same = ("benchmark", "questions")
    log.check(against, {k: other.get(k) for k in same}, {k: header[k] for k in same})
    answered(questions, texts, config.against)
    theirs = scored(config, benchmark, questions, texts, other, against.parent)
    clusters = [q.cluster for q in questions]
    return {
        "model": other["model"],
        "metrics": paired(metrics, theirs, clusters, seed=config.seed),
    }


def _row(metric: Metric, interval: tuple[float, float] | None) -> dict[str, float]:
    low_high = dict(zip(("low", "high"), interval, strict=True)) if interval else {}
    return {"value": metric.value, **low_high}


def table(record: dict[str, Any]) -> str:
    """Metrics with their intervals, and differences, as text."""
    rows = record["metrics"]
    width = max(map(len, rows))
    settings = record["settings"]
    lines = [
        f"{settings['model']} on {settings['benchmark']}: {counted(record['count'], 'question')}, "
        f"95 % intervals over {counted(record['clusters'], 'cluster')}"
    ]
    for name, row in rows.items():
        span = f"   {row['low']:.2f} to {row['high']:.2f}" if "low" in row else ""
        lines.append(f"  {name:{width}} {row['value']:8.2f}{span}")
    if other := record.get("against"):
        lines.append(f"against {other['model']}, paired:")
        for name, row in other["metrics"].items():
            lines.append(
                f"  {name:{width}} {row['difference']:+8.2f}   {row['low']:.2f} to "
                f"{row['high']:.2f}, p = {row['p']:.4f}"
            )
    return "\n".join(lines)
