"""Trains a model stage by stage; each stage leaves a folder that `converters.load` reads."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import converters
from experiments.tasks.common import required
from vfjax import InputError, Model, Processor
from vfjax.data import Batches, Conversations
from vfjax.sharding import make_mesh
from vfjax.train import (
    Group,
    LoRAConfig,
    Optim,
    Options,
    Stopped,
    TensorBoard,
    WandB,
    add_lora,
    fit,
    merge_lora,
    report,
)
from vfjax.train.record import Tracker


def run(config: ConfigDict, workdir: Path) -> None:
    stages = {name: config.stages[name] for name in config.stages}
    folders = {name: workdir / name for name in stages}
    for name, stage in stages.items():
        if not stage.data:
            raise InputError(
                f"config.stages.{name}.data",
                found="nothing",
                expected="rows.json=folder of pictures, one or more",
                fix=f"pass --config.stages.{name}.data=\"('rows.json=folder',)\"",
            )
    data = {name: read_data(config, name) for name in stages}  # all is checked before the first
    done = [name for name, folder in folders.items() if (folder / "model").is_dir()]
    for name in list(stages)[len(done) :]:
        model, processor = start(config, folders[done[-1]] / "model" if done else None)
        try:
            train(config, name, model, processor, data[name], folders[name])
        except Stopped as stopped:
            print(f"stopped at step {stopped} of {name}; the same command goes on from there")
            return
        done.append(name)
    if config.report and jax.process_index() == 0:
        report(workdir / "train_report.png", folders)
    print(f"{folders[done[-1]] / 'model'}: trained; python -m converters inspect it")


def read_data(config: ConfigDict, name: str) -> list[Conversations]:
    """A stage's data sets, checked."""
    out = []
    for item in config.stages[name].data:
        rows, _, pictures = item.partition("=")
        found = Conversations(rows, pictures, skip_broken=config.skip_broken)
        if found.broken:
            print(f"{rows}: {len(found.broken)} broken rows left out, the first: {found.broken[0]}")
        out.append(found)
    return out


def start(config: ConfigDict, folder: Path | None) -> tuple[Model, Processor]:
    """The model that the next stage trains: the last stage's, a given one, or a new one."""
    mesh = make_mesh(*config.mesh) if jax.device_count() > 1 else None
    if folder is not None or config.model:
        return converters.load(folder or config.model, mesh=mesh, dtype=config.dtype)
    required(config, "llm", "encoder")
    return converters.create(
        config.llm,
        config.encoder,
        {"kind": config.connector, **(config.options or {})},
        aux=config.aux,
        aspect=config.aspect,
        seed=config.seed,
        mesh=mesh,
        dtype=config.dtype,
    )


def train(
    config: ConfigDict,
    name: str,
    model: Model,
    processor: Processor,
    data: list[Conversations],
    folder: Path,
) -> None:
    """One stage, from its first step or where it was stopped, to a folder of its model."""
    stage = config.stages[name]
    rows = [len(x) for x in data]
    batches = Batches(
        list(zip(data, stage.weights or rows, strict=True)),
        dataclasses.replace(processor, template=stage.template or processor.template),
        batch=stage.batch,
        accumulate=stage.accumulate,
        seed=config.seed,
        steps=stage.steps or None,
        length=min(stage.length, processor.config.llm.context),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if stage.lora.rank:
        add_lora(model, LoRAConfig(**stage.lora), seed=config.seed)
    print(f"{name}: {sum(rows):,} rows, {batches.steps:,} steps")
    model = fit(
        model,
        batches.to_iter,
        [Group(pattern, rate, stage.weight_decay) for pattern, rate in stage.train],
        Optim(batches.steps, stage.warmup, stage.schedule, stage.clip),
        folder,
        config=settings(config, name, rows),
        options=Options(
            dtype=config.dtype,
            remat=config.remat,
            save_every=config.save_every,
            keep=config.keep,
            log_every=config.log_every,
            profile=config.profile,
        ),
        trackers=trackers(config, name, folder),
    )
    if batches.broken:
        print(f"{len(batches.broken)} broken rows replaced, the first: {batches.broken[0]}")
    converters.export(merge_lora(model), folder / "model")


def settings(config: ConfigDict, name: str, rows: list[int]) -> dict[str, Any]:
    """What a stage's states depend on."""
    model = {key: config[key] for key in ("model", "llm", "encoder", "aux", "connector", "options")}
    return {**model, "dtype": config.dtype, "seed": config.seed, "rows": rows} | {
        key: value
        for key, value in config.stages[name].to_dict().items()
        if key != "data"  # which may have moved
    }


def trackers(config: ConfigDict, name: str, folder: Path) -> list[Tracker]:
    """TensorBoard and W&B, if asked for, on the first process."""
    out: list[Tracker] = []
    if jax.process_index():
        return out
    if config.tensorboard:
        out.append(TensorBoard(folder / "tensorboard"))
    if config.wandb:
        out.append(WandB(config.wandb, name, folder))
    return out
