"""Writes the documents' tables from the JSON files that their measurements left.

    python experiments/tables.py [--check]

A table stands between <!-- NAME --> and <!-- /NAME -->; what is there is replaced. With --check
nothing is written, and the exit code is 1 where a document says something else.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

RESULTS = ROOT / "experiments" / "bench" / "results"
FAMILY = ROOT / "experiments" / "family"
LANGUAGE = ROOT / "experiments" / "language"

CARDS = ("clip", "dino")
"""Members whose cards have a score."""

Record = Mapping[str, Any]


def read(file: Path) -> Any:  # JSON in which each measurement has keys of its own
    return json.loads(file.read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; columns after the first are to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines]


def basic() -> list[str]:
    """Times beside transformers' on the AMD CPU, and the ratios on the Intel CPU."""
    intel = {row["name"]: row["ratio"] for row in read(RESULTS / "basic-intel.json")["rows"]}
    rows = []
    for row in read(RESULTS / "basic-amd.json")["rows"]:
        times = [f"{row[key]:.3f} {row['unit']}" for key in ("ours", "peer")]
        other = f"{intel[row['name']]:.2f}" if row["name"] in intel else ""
        rows.append([row["name"], *times, f"{row['ratio']:.2f}", other])
    return markdown(["", "vfjax", "transformers", "ratio", "ratio on the Intel CPU"], rows)


MERGES = {
    "dare": "dare_ties, rescaled as mergekit does",
    "dare, default rescale": "dare_ties, rescaled as the paper does",
}


def merge() -> list[str]:
    """Merges of 1.1 billion parameters beside mergekit's and a copy."""
    found: dict[str, dict[str, Record]] = {}
    for row in read(RESULTS / "merge-cpu.json")["rows"]:
        name, _, what = row["name"].partition(": ")
        found.setdefault(name, {})[what] = row
    rows = []
    for name, row in found.items():
        wall, memory, copy = (
            row[key] for key in ("wall", "anonymous memory", "wall beside a copy")
        )
        rows.append(
            [
                MERGES.get(name, name),
                f"{wall['ours']:.1f} s",
                f"{wall['peer']:.1f} s",
                f"{wall['ratio']:.1f}",
                f"{copy['peer']:.1f} s",
                f"{memory['ours']:.0f}, {memory['peer']:.0f} MiB",
            ]
        )
    head = ["", "vfjax", "mergekit", "ratio", "copy", "own memory of vfjax, mergekit"]
    return markdown(head, rows)


def costs() -> list[str]:
    """What members, tokens and rows cost, planned and measured."""
    found = read(RESULTS / "costs.json")
    whole = {"first answers a second": ".0f", "tokens a second": ".0f", "GiB": ".1f"}
    small = {"first answers a second": ".2f", "GiB": ".1f"}
    rows = []
    for how, keys in (("planned", whole), ("measured", small)):
        for key, style in keys.items():
            curves = found[how].values()
            cells = [", ".join(format(p[key], style) for p in c.values()) for c in curves]
            unit = f"{key} a chip" if (how, key) == ("planned", "GiB") else key
            rows.append([f"{how}: {unit}", *cells])
    heads = [f"{name} {', '.join(curve)}" for name, curve in found["planned"].items()]
    heads[-1] += f" (measured: {', '.join(found['measured']['rows'])}), two members"
    return markdown(["", *heads], rows)


def saving() -> list[str]:
    """Answers and right ones of the fused family with fewer tokens or bits."""
    found = read(RESULTS / "saving-amd.json")["notes"]["family"]
    width = max(map(len, found))
    lines = [f"{name:{width}}{row['agree']:9.1f}{row['right']:8.1f}" for name, row in found.items()]
    return ["```", f"{'':{width}}{'agree':>9}{'right':>8}", *lines, "```"]


def demo() -> list[str]:
    """What `make demo` measures: right answers by kind of question, and the fusion's gain."""
    found = read(FAMILY / "demo.json")
    rows = {who: {**row, "mean": mean(row)} for who, row in found["by_task"].items()}
    width = max(map(len, rows))
    lines = [f"{'':{width}}" + "".join(f"{kind:>9}" for kind in next(iter(rows.values())))]
    for who, row in rows.items():
        lines.append(f"{who:{width}}" + "".join(f"{x:9.1f}" for x in row.values()))
    gain = found["against the best member"]
    low, high = gain["interval"]
    points = f"{gain['difference']:.1f} points"
    end = f"The plain fusion is {points} above the better member: 95 % interval"
    drawn = f"{low:.1f} to {high:.1f}, p = {gain['p']:.4f}, by paired bootstrap over pictures."
    return ["```", *lines, "```", "", end, drawn]


def real() -> list[str]:
    """What `family_real.py` found, quiz by quiz: right answers, and each one beside the better
    member.
    """
    lines = []
    for pair, quizzes in read(FAMILY / "real" / "results.json").items():
        for quiz, found in quizzes.items():
            rows, tests = found["scores"], found["tests"]
            width = max(map(len, rows))
            head = f"{'':{width}}" + "".join(f"{kind:>9}" for kind in next(iter(rows.values())))
            lines += [f"**{pair}, {quiz}** ({found['pictures']} pictures)", "", "```"]
            lines.append(f"{head}   over {found['against']} (95 %)     p")
            for who, row in rows.items():
                line = f"{who:{width}}" + "".join(f"{x:9.1f}" for x in row.values())
                if who in tests:
                    low, high = tests[who]["interval"]
                    gain = f"{tests[who]['difference']:+.1f} ({low:+.1f} to {high:+.1f})"
                    line += f"   {gain:23} {tests[who]['p']:.4f}"
                lines.append(line)
            lines += ["```", ""]
    return lines


def mean(row: Mapping[str, float]) -> float:
    return sum(row.values()) / len(row)


def card(name: str) -> list[str]:
    """A member's right answers."""
    row = read(FAMILY / "demo.json")["by_task"][name]
    shown = {**row, "mean": mean(row)}
    return [", ".join(f"{kind} {value:.1f}" for kind, value in shown.items())]


def ways() -> list[str]:
    """Means of the ways to combine, beside the better member's."""
    found = read(FAMILY / "demo.json")
    means = {who: f"{mean(row):.1f}" for who, row in found["by_task"].items()}
    best = max((means[name] for name in found["members"]), key=float)
    fused = {who.removeprefix("fused: "): x for who, x in means.items() if "fused: " in who}
    head = ["per cent right", "the better member", "control: base LLM, all tokens", *fused]
    control = means["base LLM, all branches"]
    return markdown(head, [[", ".join(found["members"]), best, control, *fused.values()]])


SPOKEN = (
    ("descriptions", "perplexity", "data sets", ".1f"),
    ("manual", "perplexity", "manual", ".1f"),
    ("facts", "chosen", "facts chosen", ".0f"),
    ("facts", "answered", "facts answered", ".0f"),
    ("instructions", "followed", "instructions", ".0f"),
)
"""Part and metric of `language.py`'s results, their column's head and format."""


def spoken() -> list[str]:
    """Plain language of a base; of its members and their merges, with what differs from it."""
    rows = []
    for name, parts in read(LANGUAGE / "results.json")["rows"].items():
        cells = []
        for part, key, _, style in SPOKEN:
            found = parts[part][key]
            gap = found.get("to base", {})
            span = f"{found['low']:{style}} to {found['high']:{style}}"
            if "ratio" in gap:
                span = f"\u00d7 {gap['ratio']:.2f}, {gap['low']:.2f} to {gap['high']:.2f}"
            elif gap:
                span = f"{gap['difference']:+.0f}, {gap['low']:+.0f} to {gap['high']:+.0f}"
            cells.append(f"{found['value']:{style}} ({span})")
        rows.append([name, *cells])
    return markdown(["", *(head for _, _, head, _ in SPOKEN)], rows)


def buckets() -> list[str]:
    """A load from a bucket beside one plain read of its bytes."""
    record = read(RESULTS / "buckets-amd.json")
    again, first, memory = record["rows"]
    plain = record["notes"]["seconds of a plain read"]
    return [
        "Of a model of 2.5 GB, from a server on the same two cores, a load takes",
        f"{again['ours']:.1f} seconds where one plain read takes {again['peer']:.1f}",
        f"({again['ratio']:.2f} of its throughput; the reads took {min(plain):.1f} to",
        f"{max(plain):.1f}), a process's first load {first['ours']:.1f}. It takes",
        f"{memory['ours']:.0f} MiB beyond the arrays (`experiments/bench/buckets.py --layers=1`).",
    ]


TABLES: dict[str, Callable[[], list[str]]] = {
    "basic": basic,
    "merge": merge,
    "costs": costs,
    "saving": saving,
    "buckets": buckets,
    "demo": demo,
    "real": real,
    "ways": ways,
    "spoken": spoken,
    **{f"card-{name}": functools.partial(card, name) for name in CARDS},
}
"""Name -> lines."""

DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "BUILD.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    LANGUAGE / "README.md",
    *(
        FAMILY / name
        for name in ("README.md", "REAL.md", *(f"models/{name}/README.md" for name in CARDS))
    ),
)


def filled(text: str) -> str:
    """A document with its tables as they are now.

    Raises:
        KeyError: a mark names no table.
    """

    def table(match: re.Match[str]) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), f"<!-- /{match[2]} -->"])

    return re.sub(r"(<!-- ([\w-]+) -->)\n.*?<!-- /\2 -->", table, text, flags=re.DOTALL)


def main(argv: Sequence[str]) -> int:
    check = "--check" in argv
    stale = [path for path in DOCUMENTS if filled(text := path.read_text()) != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not what its JSON says' if check else 'written'}")
        if not check:
            path.write_text(filled(path.read_text()))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
