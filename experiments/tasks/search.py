"""Searches a fusion's coefficients; scores the chosen ones on questions that the search never saw.

One coefficient for all members is searched first, then each member's (or each of its groups of
layers) along the grid, the others held: coordinate search, our choice. Answers are kept by
coefficients, so the same command goes on after a kill and asks nothing twice.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import converters
from converters.export import to_bytes
from converters.files.checksums import audit_source
from converters.files.paths import stand_in
from experiments.family import scenes
from experiments.tasks.common import FAMILY, check_config, named, required
from experiments.tasks.evaluate import MEMBERS
from vfjax import InputError
from vfjax.analysis import agreement, apart, draw
from vfjax.atomic import replacing
from vfjax.eval import (
    Benchmark,
    Data,
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
from vfjax.eval.data import Options, read_lines
from vfjax.eval.stats import ratio
from vfjax.merge import METHODS

OBJECTIVES = ("score", "consistency")
Weights = tuple[tuple[float, ...], ...]
"""Coefficients: for each member one a group of layers."""


def run(config: ConfigDict, workdir: Path) -> None:
    _check(config)
    workdir.mkdir(parents=True, exist_ok=True)
    if config.members:
        required(config, "base", "benchmark", "data")
        benchmark = get_benchmark(config.benchmark)
        members, base = named("members", config.members), config.base
        tuned, held = questions(config, benchmark)
    else:
        benchmark = FAMILY_QUIZ
        members, base = {n: str(FAMILY / n) for n in MEMBERS}, str(FAMILY / "base")
        splits = (("validation", config.seed), ("test", config.seed))
        tuned, held = (family_questions(config, workdir, *split) for split in splits)
    if benchmark.judged or (benchmark.score is None and config.objective == "score"):
        raise InputError(
            "config.benchmark",
            found=f"{config.benchmark}, whose answers only a judge can score",
            expected="one that is scored here",
            fix="choose another, or llava with --config.objective=consistency",
        )
    search = Search(config, workdir, members, base, benchmark, tuned, held)
    best = search.along_lines()
    search.record["held out"] = search.held_out(best)
    search.save()
    search.draw()
    print(table(search.record))
    print(f"{workdir / 'search.png'}, {workdir / 'results.json'}")


def _check(config: ConfigDict) -> None:
    method = METHODS.get(config.method)
    check_config(
        config,
        ("method", method and "weights" in method.params, "a method with weights"),
        ("grid", len(set(config.grid)) >= 2, "at least two coefficients"),
        ("groups", config.groups >= 1, "at least 1"),
        ("rounds", config.rounds >= 0, "at least 0"),
        ("objective", config.objective in OBJECTIVES, " or ".join(OBJECTIVES)),
        ("held_out", 0 < config.held_out < 1, "between 0 and 1"),
        ("scenes", config.scenes >= 1, "at least 1"),
    )


# Questions


def questions(config: ConfigDict, benchmark: Benchmark) -> tuple[list[Question], list[Question]]:
    """A benchmark's questions in two parts that share no cluster: to search on, to score on."""
    data = Data(stand_in(config.data), stand_in(config.images) if config.images else None)
    found = read(benchmark, data, {**benchmark.options, **config.options}, config.limit)
    check_pictures(found)
    out = apart([q.cluster for q in found], config.held_out, config.seed)
    tuned, held = ([q for q, away in zip(found, out, strict=True) if away == x] for x in (0, 1))
    if not tuned or not held:
        raise InputError(
            config.data,
            found="questions about one picture",
            expected="several pictures",
            fix="use more of the benchmark",
        )
    return tuned, held


def family_questions(config: ConfigDict, workdir: Path, split: str, seed: int) -> list[Question]:
    """Scenes of a split of the family's, a question of every kind about each."""
    folder = workdir / f"{split}-{config.scenes}-{seed}"
    scenes.ensure(folder, split, config.scenes, seed)
    return [
        Question(
            f"{row['image']} {kind}",
            question,
            (folder / "images" / row["image"],),
            answers=(answer,),
            cluster=row["image"],
        )
        for row in read_lines(folder / "scenes.json")
        for kind, (question, answer) in row["questions"].items()
    ]


def _right(asked: Sequence[Question], texts: Sequence[str], options: Options) -> dict[str, Metric]:
    del options
    return {"right": ratio([q.answers == (t,) for q, t in zip(asked, texts, strict=True)])}


FAMILY_QUIZ = Benchmark(lambda data, options: [], _right, max_new_tokens=2)
"""The scenes' questions; answers are one word."""


# The search


@dataclasses.dataclass
class Search:
    """Candidates, their answers and what became of them.

    Attributes:
        config: the task's.
        workdir: holds answers/PART/COEFFICIENTS and results.json.
        members: name -> folder.
        base: folder.
        benchmark: how answers are scored.
        tuned: questions to search on.
        held: questions to score on, never asked of more than the chosen and the equal weights.
    """

    config: ConfigDict
    workdir: Path
    members: dict[str, str]
    base: str
    benchmark: Benchmark
    tuned: list[Question]
    held: list[Question]

    def __post_init__(self) -> None:
        towers = named("towers", self.config.towers)
        opened = [
            converters.open_source(path, towers=towers, base=self.base)
            for path in self.members.values()
        ]
        opened.append(converters.open_source(self.base))
        sums = [sum for source in opened for sum in audit_source(source).values()]
        self.length = self.config.max_new_tokens or self.benchmark.max_new_tokens
        self.settings = {
            "benchmark": self.config.benchmark or "family",
            "members": list(self.members),
            "sources": hashlib.sha256("".join(sums).encode()).hexdigest(),
            "method": self.config.method,
            "dtype": self.config.dtype,
            "max_new_tokens": self.length,
        }
        share = 1 / len(self.members)
        self.equal: Weights = ((share,) * self.config.groups,) * len(self.members)
        self.record: dict[str, Any] = {
            "settings": self.settings,
            "objective": self.config.objective,
            "questions": {"searched on": len(self.tuned), "held out": len(self.held)},
            "lines": [],
        }

    def along_lines(self) -> Weights:
        """The best coefficients; results.json grows with every line."""
        best = self.equal
        spots: list[tuple[int | None, int | None]] = [(None, None)]
        spots += [
            (m, g) for m in range(len(best)) for g in range(len(best[0]))
        ] * self.config.rounds
        for spot in spots:
            best = self.line(best, *spot)
        return best

    def line(self, best: Weights, member: int | None, group: int | None) -> Weights:
        """Tries the grid in one place (None: all at once) and returns the best of the line."""
        now = best[member or 0][group or 0]
        grid = sorted({*map(float, self.config.grid), now})
        tried = [put(best, member, group, weight) for weight in grid]
        line: dict[str, Any] = {"place": self.place(member, group), "grid": grid, "score": []}
        answers = []
        for weights in tried:
            answers.append(self.answers("searched on", self.tuned, weights))
            if self.benchmark.score is not None:
                line["score"].append(self.metric(self.tuned, answers[-1]).value)
            self.save(line)
        values = line["score"]
        if self.config.objective == "consistency":
            values = line["consistency"] = (100 * agreement(answers)).tolist()
        pick = max(range(len(grid)), key=lambda i: (values[i], -abs(grid[i] - now)))
        line |= {"chosen": grid[pick], "weights": tried[pick]}
        self.record["lines"].append(line)
        self.save()
        print(f"{line['place']}: {grid[pick]:g}", flush=True)
        return tried[pick]

    def place(self, member: int | None, group: int | None) -> str:
        """What a line moves along, in words."""
        if member is None:
            return "all members"
        name, groups = list(self.members)[member], self.config.groups
        return name if groups == 1 else f"{name}, group {(group or 0) + 1} of {groups}"

    def answers(self, part: str, asked: list[Question], weights: Weights) -> list[str]:
        """A candidate's answers; asks only what has not been answered in an earlier run."""
        folder = self.workdir / "answers" / part.replace(" ", "-") / said(weights)
        header = {**self.settings, "questions": digest(asked), "weights": weights}
        header = json.loads(json.dumps(header))  # as it is read again
        known = log.read_parts(folder, header) if folder.is_dir() else {}
        if any(q.id not in known for q in asked):
            model, processor = self.fused(weights)
            predict(
                model,
                processor,
                asked,
                folder,
                header,
                batch=self.config.batch,
                max_new_tokens=self.length,
            )
            known = log.read_parts(folder, header)
        return [known[q.id] for q in asked]

    def fused(self, weights: Weights) -> tuple[Any, Any]:
        """A candidate, merged in memory."""
        params = {"weights": tuple(x[0] if len(x) == 1 else list(x) for x in weights)}
        return converters.load_fused(
            self.members,
            base=self.base,
            method=self.config.method,
            params=params,
            dtype=self.config.dtype,
            towers=named("towers", self.config.towers),
        )

    def metrics(self, asked: list[Question], texts: list[str]) -> dict[str, Metric]:
        """All scores of answers, the one that counts first."""
        assert self.benchmark.score is not None
        options = {**self.benchmark.options, **self.config.options}
        found = self.benchmark.score(asked, texts, options)
        name = self.config.metric or next(iter(found))
        if name not in found:
            raise InputError(
                "config.metric", found=repr(name), expected=", ".join(found), fix="name one of them"
            )
        return {name: found[name], **found}

    def metric(self, asked: list[Question], texts: list[str]) -> Metric:
        return next(iter(self.metrics(asked, texts).values()))

    def held_out(self, best: Weights) -> dict[str, Any]:
        """Chosen and equal weights on the questions that the search has not seen."""
        if self.benchmark.score is None:
            return {"weights": best}
        clusters = [q.cluster for q in self.held]
        rows: dict[str, Any] = {}
        found = {}
        for who, weights in (("chosen", best), ("equal", self.equal)):
            texts = self.answers("held out", self.held, weights)
            found[who] = self.metrics(self.held, texts)
            spans = intervals(found[who], clusters, seed=self.config.seed)
            name, metric = next(iter(found[who].items()))
            rows[who] = {"weights": weights, "metric": name, "value": metric.value}
            rows[who] |= dict(zip(("low", "high"), spans.get(name, ()), strict=False))
        against = paired(found["chosen"], found["equal"], clusters, seed=self.config.seed)
        rows["chosen - equal"] = against.get(rows["chosen"]["metric"])
        return rows

    def save(self, line: dict[str, Any] | None = None) -> None:
        """results.json so far, with the line that is being searched."""
        record = {**self.record, "lines": self.record["lines"] + ([line] if line else [])}
        with replacing(self.workdir / "results.json") as part:
            part.write_bytes(to_bytes(record))

    def draw(self) -> None:
        """search.png: objective by coefficient, a panel a line; never the held-out score."""
        panels = []
        for line in self.record["lines"]:
            used = line.get(self.config.objective)
            curves = {self.config.objective: used}
            if self.config.objective != "score" and line["score"]:
                curves["score, not used"] = line["score"]
            panels.append((line["place"], line["grid"], curves, line["chosen"]))
        draw.curves(self.workdir / "search.png", panels, "coefficient", "per cent, searched on")


def put(weights: Weights, member: int | None, group: int | None, value: float) -> Weights:
    """Coefficients with one of them, or all, replaced."""
    return tuple(
        tuple(
            value if member in (None, m) and group in (None, g) else old
            for g, old in enumerate(own)
        )
        for m, own in enumerate(weights)
    )


def said(weights: Weights) -> str:
    """Coefficients as the name of a folder."""
    return "_".join(",".join(f"{x:.6g}" for x in own) for own in weights)


def table(record: dict[str, Any]) -> str:
    """The held-out scores as text."""
    held, count = record["held out"], record["questions"]
    if "chosen" not in held:
        return f"chosen {said(held['weights'])}; no labels to score it by"
    lines = [
        f"{count['held out']:,} held-out questions; searched on {count['searched on']:,} others, "
        f"by {record['objective']}"
    ]
    for who in ("chosen", "equal"):
        row = held[who]
        span = f"   {row['low']:.2f} to {row['high']:.2f}" if "low" in row else ""
        lines.append(
            f"  {who:7} {said(row['weights']):20} {row['metric']} {row['value']:.2f}{span}"
        )
    if gap := held["chosen - equal"]:
        lines.append(
            f"  chosen - equal: {gap['difference']:+.2f}   {gap['low']:.2f} to {gap['high']:.2f}, "
            f"p = {gap['p']:.4f}"
        )
    return "\n".join(lines)
