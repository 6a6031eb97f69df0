"""Plain language of a base LLM, of its members' LLMs and of their merges, measured side by side.

Perplexity on texts from packages, questions of fact, instructions that a rule checks; no picture is
shown. All LLMs have one shape, so what is compiled for the base runs them all, and all are asked by
the base's template. What was measured is kept for each LLM: the same command goes on after a kill.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import converters
from converters.export import to_bytes
from experiments.family.members import next_logits
from experiments.family.study import with_llm
from experiments.language import facts, instructions, prose
from experiments.tasks.common import check_config, named, required
from vfjax import InputError, Model
from vfjax.atomic import read_json, replacing
from vfjax.eval import Metric, Question, digest, intervals, log, paired, predict
from vfjax.eval.likelihood import log_likelihoods
from vfjax.eval.stats import ratio
from vfjax.llm import Llama
from vfjax.merge import METHODS, merge

LENGTHS = (16, 32, 48)
"""Of short prompts, beside those of `Processor`."""

FACT_TOKENS = 24
"""New tokens of an answer to a question of fact."""

NATS = "nats a token"

Progress = Callable[[int], object]

Metrics = dict[str, tuple[Mapping[str, Metric], list[str]]]
"""Part -> its metrics and the cluster of each of their terms."""


def run(config: ConfigDict, workdir: Path) -> None:
    required(config, "base")
    _check(config)
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"reads {config.base}", flush=True)
    study = Study(config, workdir)
    record: dict[str, Any] = {"settings": study.settings, "counts": study.counts(), "rows": {}}
    base: Metrics | None = None
    for name, made, load in study.candidates():
        print(name, flush=True)
        found = study.measure(name, made, load)
        record["rows"][name] = row(found, base, draws=config.draws, seed=config.seed)
        base = base or found
        with replacing(workdir / "results.json") as part:
            part.write_bytes(to_bytes(record))
    print(table(record["rows"]))
    print(workdir / "results.json")


def _check(config: ConfigDict) -> None:
    method = METHODS.get(config.method)
    check_config(
        config,
        ("method", method and "weights" in method.params, "a method with weights"),
        ("window", config.window >= 2, "at least 2"),
        ("tokens", config.tokens >= 2, "at least 2"),
        ("documents", config.documents >= 1, "at least 1"),
        ("batch", config.batch >= 1, "at least 1"),
        ("draws", config.draws >= 1, "at least 1"),
        ("limit", config.limit >= 1, "at least 1"),
    )


class Study:
    """What is asked, of whom, and where the answers are.

    Args:
        config: the task's.
        workdir: a folder an LLM is made in it.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config, self.workdir = config, workdir
        self.members = named("members", config.members)
        self.towers = named("towers", config.towers)
        self.base, processor = converters.load(config.base, dtype=config.dtype)
        self.processor = dataclasses.replace(processor, lengths=LENGTHS + processor.lengths)
        if self.base.config.branches:
            raise InputError(
                "config.base", found="a model that sees", expected="an LLM", fix="name its LLM"
            )
        self.texts = {kind: read()[: config.documents] for kind, (read, _) in prose.TEXTS.items()}
        self.facts = _first(facts.facts(), config.limit)
        self.instructions = _first(instructions.instructions(), config.limit)
        self.windows = {kind: self._windows(texts) for kind, texts in self.texts.items()}
        self.tokens = {  # that are predicted
            kind: [sum(len(window) - 1 for window in each) for each in documents]
            for kind, documents in self.windows.items()
        }
        self.questions = {
            "facts": [
                Question(f"{fact.kind} {n}", fact.question) for n, fact in enumerate(self.facts)
            ],
            "instructions": [Question(f"{i.kind}: {i.about}", i.prompt) for i in self.instructions],
        }
        self.settings: dict[str, Any] = {
            key: config[key] for key in ("window", "tokens", "batch", "dtype", "max_new_tokens")
        }
        self.settings["texts"] = {
            kind: {"of": prose.TEXTS[kind][1](), "sha256": prose.digest(texts)}
            for kind, texts in self.texts.items()
        }
        starts = [[fact.start, *fact.options] for fact in self.facts]
        self.settings["facts"] = hashlib.sha256(to_bytes(starts)).hexdigest()

    def counts(self) -> dict[str, int]:
        """Tokens that are predicted, by kind of text; facts; instructions."""
        tokens = {kind: sum(counts) for kind, counts in self.tokens.items()}
        return tokens | {part: len(questions) for part, questions in self.questions.items()}

    def _windows(self, texts: Sequence[prose.Text]) -> list[list[list[int]]]:
        """Windows of each document."""
        window, most = self.config.window, self.config.tokens
        return [prose.windows(self.processor.tokenize(t.words), window, most) for t in texts]

    def candidates(self) -> Iterator[tuple[str, dict[str, Any], Callable[[], Model]]]:
        """The base, each member, and a merge a weight: name, what it is made of, what makes it."""
        base = sha256(self.base.llm)
        yield "base", {"weights": base}, lambda: self.base
        sums = []
        for name in self.members:
            llm = self._member(name)
            sums.append(sha256(llm))
            yield name, {"weights": sums[-1]}, functools.partial(with_llm, self.base, llm)
        for weight in self.config.weights if self.members else ():
            made = {"weights": [base, *sums], "method": self.config.method, "weight": weight}
            yield f"merged {weight:g}", made, functools.partial(self._merged, weight)

    @functools.cache  # noqa: B019 (a study lives as long as its task)
    def _member(self, name: str) -> Llama:
        config, path = self.config, self.members[name]
        model, _ = converters.load(path, base=config.base, dtype=config.dtype, towers=self.towers)
        if model.llm.config != self.base.llm.config:
            raise InputError(
                f"member {name}",
                found=f"an LLM of {model.llm.config}",
                expected=f"the base's {self.base.llm.config}",
                fix="name members that were tuned from the base, with its vocabulary",
            )
        return model.llm

    def _merged(self, weight: float) -> Model:
        """A merge in memory, by the engine that writes checkpoints."""
        llms = {name: arrays(self._member(name)) for name in self.members}
        params = {"weights": (weight,) * len(llms)}
        merged = merge(arrays(self.base.llm), llms, self.config.method, params)
        graph, state = nnx.split(self.base.llm)
        flat = nnx.to_flat_state(state)
        made = [(path, x.replace(jnp.asarray(merged[key(path)][...]))) for path, x in flat]
        return with_llm(self.base, nnx.merge(graph, nnx.from_flat_state(made)))

    def measure(self, name: str, made: Mapping[str, Any], load: Callable[[], Model]) -> Metrics:
        """All metrics of an LLM, computed where they are not kept."""
        folder = self.workdir / name.replace(" ", "-")
        header = json.loads(json.dumps({**self.settings, **made}))
        model = functools.cache(load)
        count = sum(len(document) for kind in self.windows.values() for document in kind)
        count += sum(map(len, self.questions.values()))
        with tqdm(desc=name, total=count, unit="row", disable=None) as bar:
            logs = self.likelihoods(folder / "likelihoods.json", header, model, bar.update)
            texts = {
                part: self.answers(folder / part, header, part, model, bar.update)
                for part in self.questions
            }
        return {
            **{kind: self._perplexity(kind, logs[kind]) for kind in self.texts},
            "facts": self._facts(logs["facts"], texts["facts"]),
            "instructions": self._instructions(texts["instructions"]),
        }

    def likelihoods(
        self,
        file: Path,
        header: Mapping[str, Any],
        model: Callable[[], Model],
        progress: Progress,
    ) -> dict[str, Any]:
        """Sums of log p: of each document by kind, and of each fact's answers."""
        if file.is_file():
            kept = read_json(file, "remove it, or pass another --workdir")
            log.check(file, kept["settings"], header)
            return kept
        found: dict[str, Any] = {"settings": header}
        for kind, documents in self.windows.items():
            rows = [window for document in documents for window in document]
            read = log_likelihoods(
                model(), self.processor, rows, batch=self.config.batch, progress=progress
            )
            logs = iter(read)
            found[kind] = [float(sum(next(logs).sum() for _ in each)) for each in documents]
        found["facts"] = self.options(model())
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_bytes(to_bytes(found))
        return found

    def options(self, model: Model) -> list[list[float]]:
        """The log p of each fact's options, of the first token that tells them apart."""
        starts, ends = list[Sequence[int]](), list[list[int]]()
        for fact in self.facts:
            rows = [self.processor.tokenize(f"{fact.start} {option}") for option in fact.options]
            same = list(os.path.commonprefix(rows))
            nexts = [row[len(same)] for row in rows if len(row) > len(same)]
            if len(set(nexts)) < len(rows):
                raise InputError(
                    f"fact {fact.start!r}",
                    found=f"options {fact.options} of which two begin alike",
                    expected="first tokens that differ, in the base's vocabulary",
                    fix="use a base with another tokenizer",
                )
            starts.append(same)
            ends.append(nexts)
        out = []
        for at in range(0, len(starts), self.config.batch):
            some = starts[at : at + self.config.batch]
            some += some[:1] * (self.config.batch - len(some))
            logits = np.asarray(next_logits(model, self.processor(input_ids=some)), np.float64)
            logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            out += [row[ids].tolist() for row, ids in zip(logs, ends[at:], strict=False)]
        return out

    def answers(
        self,
        folder: Path,
        header: Mapping[str, Any],
        part: str,
        model: Callable[[], Model],
        progress: Progress,
    ) -> list[str]:
        """Greedy answers to a part's questions, in their order."""
        questions = self.questions[part]
        length = FACT_TOKENS if part == "facts" else self.config.max_new_tokens
        header = {**header, "benchmark": part, "questions": digest(questions)}
        known = log.read_parts(folder, header) if folder.is_dir() else {}
        if any(q.id not in known for q in questions):
            predict(
                model(),
                self.processor,
                questions,
                folder,
                header,
                batch=self.config.batch,
                max_new_tokens=length,
                progress=progress,
            )
            known = log.read_parts(folder, header)
        return [known[q.id] for q in questions]

    def _perplexity(self, kind: str, sums: Sequence[float]) -> tuple[dict[str, Metric], list[str]]:
        metric = ratio(-np.array(sums), np.array(self.tokens[kind], float), scale=1.0)
        return {NATS: metric}, [text.name for text in self.texts[kind]]

    def _facts(
        self, sums: Sequence[Sequence[float]], texts: Sequence[str]
    ) -> tuple[dict[str, Metric], list[str]]:
        logs = np.array(sums)
        shares = np.exp(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))
        pairs = zip(self.facts, texts, strict=True)
        metrics = {
            "chosen": ratio((logs.argmax(axis=1) == 0).astype(float)),
            "probability": ratio(shares[:, 0]),
            "answered": ratio([float(facts.answered(fact, text)) for fact, text in pairs]),
        }
        return metrics, [question.id for question in self.questions["facts"]]

    def _instructions(self, texts: Sequence[str]) -> tuple[dict[str, Metric], list[str]]:
        pairs = list(zip(self.instructions, texts, strict=True))
        kept = np.array([float(each.followed(text)) for each, text in pairs])
        return {"followed": ratio(kept)}, [q.id for q in self.questions["instructions"]]


def _first(items: Sequence[Any], limit: int) -> list[Any]:
    """The first of each kind."""
    kinds: dict[str, list[Any]] = {}
    for item in items:
        kinds.setdefault(item.kind, []).append(item)
    return [item for some in kinds.values() for item in some[:limit]]


def key(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def arrays(llm: Llama) -> dict[str, np.ndarray]:
    """Parameters by path."""
    return {key(path): np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(llm))}


def sha256(llm: Llama) -> str:
    """Of all parameters: it tells answers of other weights apart."""
    whole = hashlib.sha256()
    for name, array in sorted(arrays(llm).items()):
        whole.update(name.encode())
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


# The report


def row(found: Metrics, base: Metrics | None, *, draws: int, seed: int) -> dict[str, Any]:
    """An LLM's metrics with 95 % intervals, and against the base's, paired: by bootstrap.

    Documents, facts and instructions are drawn again. A perplexity's interval is that of its
    logarithm; in place of a difference to the base's it has the ratio.

    Args:
        found: of the LLM.
        base: of the base; None for itself.
        draws: bootstrap samples.
        seed: of the draws.
    """
    out: dict[str, Any] = {}
    for part, (metrics, clusters) in found.items():
        spans = intervals(metrics, clusters, draws=draws, seed=seed)
        gaps = base and paired(metrics, base[part][0], clusters, draws=draws, seed=seed)
        out[part] = {}
        for name, metric in metrics.items():
            low, high = spans[name]
            one = {"value": metric.value, "low": low, "high": high}
            out[part][name] = {**one, "to base": gaps[name]} if gaps else one
        if NATS in out[part]:
            out[part]["perplexity"] = _exponential(out[part].pop(NATS))
    return out


def _exponential(found: Mapping[str, Any]) -> dict[str, Any]:
    """A perplexity, from nats a token."""
    out: dict[str, Any] = {key: float(np.exp(found[key])) for key in ("value", "low", "high")}
    if "to base" in found:
        gap = found["to base"]
        out["to base"] = {
            "ratio": float(np.exp(gap["difference"])),
            **{key: float(np.exp(gap[key])) for key in ("low", "high")},
            "p": gap["p"],
        }
    return out


COLUMNS = (
    ("descriptions", "perplexity"),
    ("manual", "perplexity"),
    ("facts", "chosen"),
    ("facts", "probability"),
    ("facts", "answered"),
    ("instructions", "followed"),
)


def table(rows: Mapping[str, Any]) -> str:
    """A row an LLM; see `cell`."""
    heads = [key if key != "perplexity" else part for part, key in COLUMNS]
    lines = [f"{'':14}" + "".join(f"{head:>16}" for head in heads)]
    for name, parts in rows.items():
        cells = "".join(f"{cell(parts[part][key]):>16}" for part, key in COLUMNS)
        lines.append(f"{name:14}{cells}")
    return "\n".join(lines)


def cell(found: Mapping[str, Any]) -> str:
    """A value, marked with * where it differs from the base's (p < 0.05)."""
    gap = found.get("to base")
    return f"{found['value']:.1f}{'*' if gap and gap['p'] < 0.05 else ''}"
