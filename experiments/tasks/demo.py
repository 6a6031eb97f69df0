"""Two small LLaVAs of one base are made, fused, asked about a photograph, exported, checked.

Their weights are random, as none can be downloaded here: what is shown is that the path is exact,
not that the answers are good.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import skimage
from ml_collections import ConfigDict

import converters
import vfjax
from converters.export import to_bytes
from experiments.tasks.common import bar
from experiments.tasks.toys import QUESTION, write_family
from vfjax import InputError, Model, Processor

NAMES = ("clip", "dino")
WEIGHTS = (0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table: what was compared, the figure, whether it holds."""

    what: str
    figure: str
    ok: bool


def run(config: ConfigDict, workdir: Path) -> None:
    start = time.perf_counter()
    family = workdir / "family"
    if workdir.exists():
        _clear(workdir)
    folders = write_family(family, config.seed)
    members = {name: folders[name] for name in NAMES}
    recipe: dict[str, Any] = {"base": folders["base"], "params": {"weights": list(WEIGHTS)}}
    with bar("fuse") as progress:
        converters.fuse(members, workdir / "fused", **recipe, progress=progress)
        converters.fuse(members, workdir / "llm", **recipe, export="llm", progress=progress)

    loaded = {
        name: converters.load(folder, dtype="float32")
        for name, folder in {**members, "fused": workdir / "fused"}.items()
    }
    photo = Path(skimage.__file__).parent / "data" / "chelsea.png"
    print(f"\n{photo.name} of scikit-image, {QUESTION!r} (random weights: the text means nothing)")
    answers = {name: ask(*pair, photo, config.max_new_tokens) for name, pair in loaded.items()}
    for name, (model, _) in loaded.items():
        tokens = "+".join(str(b.tokens) for b in model.config.branches)
        print(f"  {name:<6} {tokens:>6} visual tokens  {answers[name]!r}")

    checks = [
        check_merge(folders, workdir / "llm"),
        check_tokens({name: model for name, (model, _) in loaded.items()}),
        *check_transformers(workdir / "llm", *loaded["fused"]),
    ]
    print("\nchecked")
    for check in checks:
        print(f"  {'ok  ' if check.ok else 'FAIL'}  {check.what:<62} {check.figure}")
    print(f"\n{workdir}/fused is the fused model, {workdir}/llm its LLM for transformers")
    print(f"{time.perf_counter() - start:.0f} s")
    record = {"answers": answers, "checks": [dataclasses.asdict(c) for c in checks]}
    (workdir / "results.json").write_bytes(to_bytes(record))
    if failed := [check for check in checks if not check.ok]:
        raise InputError(
            failed[0].what,
            found=failed[0].figure,
            expected="ok",
            fix="report it with your versions",
        )


def _clear(workdir: Path) -> None:
    """Removes the last demo; any other folder is left alone."""
    if any(workdir.iterdir()) and not (workdir / "family").is_dir():
        raise InputError(
            workdir, found="other files", expected="a new folder", fix="pass another --workdir"
        )
    shutil.rmtree(workdir)


def ask(model: Model, processor: Processor, photo: Path, steps: int) -> str:
    """The model's answer to the demo's question."""
    batch = processor([photo], [processor.chat(QUESTION)])
    (text,) = vfjax.generate(model, processor, batch, max_new_tokens=steps)
    return text


def check_merge(folders: dict[str, Path], merged: Path) -> Check:
    """Base + sum of w (member - base), in float64, rounded once to bfloat16."""
    llm = {name: converters.open_source(path).parts["llm"] for name, path in folders.items()}
    result = converters.open_source(merged).parts["llm"]
    same = total = 0
    for name, tensor in result.items():
        base, *others = (llm[n][name][...].astype(np.float64) for n in ("base", *NAMES))
        exact = base + sum(w * (x - base) for w, x in zip(WEIGHTS, others, strict=True))
        same += int((exact.astype(tensor.dtype) == tensor[...]).sum())
        total += exact.size
    return Check(
        "merged LLM = base + sum of w (member - base), float64 rounded once",
        f"{same:,} of {total:,} values equal",
        same >= 0.9999 * total,
    )


def check_tokens(models: dict[str, Model]) -> Check:
    """The fused model reads every member's tokens."""
    count = {name: sum(b.tokens for b in m.config.branches) for name, m in models.items()}
    each = [count[name] for name in NAMES]
    return Check(
        "visual tokens of the fused model = those of its members",
        f"{' + '.join(map(str, each))} = {count['fused']}",
        sum(each) == count["fused"],
    )


def check_transformers(folder: Path, model: Model, processor: Processor) -> list[Check]:
    """The exported LLM, opened by transformers, against the fused model on text."""
    import torch
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    odd = sorted([*report["missing_keys"], *report["unexpected_keys"]])
    prompt = processor.chat(QUESTION, images=0)
    batch = processor(None, [prompt])
    ids = batch.tokens[batch.mask]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids[None], dtype=torch.long)).logits[0].numpy()
        tokens = theirs.generate(
            torch.tensor(ids[None], dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
    found = np.asarray(vfjax.forward(model, jax.tree.map(np.asarray, batch)))[batch.mask]
    error = float(np.abs(found - expected).max())
    (ours,) = vfjax.generate_ids(model, batch, max_new_tokens=16)
    return [
        Check("exported LLM opens in transformers", f"{len(odd)} missing or unexpected", not odd),
        Check("its logits equal ours", f"largest difference {error:.1e}", error < 1e-4),
        Check("its 16 greedy tokens equal ours", f"{ours == tokens}", ours == tokens),
    ]
