"""Trains a model stage by stage; each stage leaves a folder that `converters.load` reads."""

import dataclasses
import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

import converters
from converters.files.output import check_new
from experiments.tasks.common import required
from vfjax import InputError, Model, Processor
from vfjax.atomic import refuse_link
from vfjax.data import Batches, Conversations
from vfjax.errors import counted, shown
from vfjax.model import ModelConfig
from vfjax.processes import agreeing, together
from vfjax.sharding import make_mesh, mesh_of, row_shards
from vfjax.train import (
    Group,
    LoRAConfig,
    Optim,
    Options,
    Stopped,
    TensorBoard,
    WandB,
    adapters,
    add_lora,
    check_groups,
    fit,
    merge_lora,
    report,
    same_config,
)
from vfjax.train.optim import name_of
from vfjax.train.record import Tracker, missing


def run(config: ConfigDict, workdir: Path) -> None:
    stages = ordered(config)
    folders = {name: workdir / name for name in stages}
    with agreeing("train", folder=workdir) as facts:
        data = {name: read_data(config, name) for name in stages}  # all, before the first is run
        if jax.process_count() > 1:
            for name, sets in data.items():
                facts |= {f"stages.{name}: rows of {x.path.name}": x.digest() for x in sets}
    if config.report and find_spec("matplotlib") is None:
        raise missing("report", "matplotlib", "train")
    done = list(itertools.takewhile(lambda name: (folders[name] / "model").is_dir(), stages))
    for name in done:
        same_config(folders[name] / "states", settings(config, name, data[name]))
    for name in stages[len(done) :]:  # what they would find at their end
        refuse_link(folders[name])
        check_new(folders[name] / "model")
    checked = False
    for name in stages[len(done) :]:
        model, processor = start(config, folders[done[-1]] / "model" if done else None)
        if not checked:
            check(config, stages[len(done) :], model)
            checked = True
        try:
            train(config, name, model, processor, data[name], folders[name])
        except Stopped as stopped:
            print(f"stopped at step {stopped} of {name}; the same command goes on from there")
            return
        done.append(name)
    if config.report and jax.process_index() == 0:
        report(workdir / "train_report.png", folders)
    print(f"{shown(folders[done[-1]] / 'model')}: trained; python -m converters inspect it")


def ordered(config: ConfigDict) -> list[str]:
    """The stages as they are trained."""
    if lost := sorted(set(config.stages) - set(config.order)):
        raise InputError(
            "config.order", found=f"no stage {lost[0]!r}", expected="all stages", fix="add it"
        )
    return [name for name in config.order if name in config.stages]


def read_data(config: ConfigDict, name: str) -> list[Conversations]:
    """A stage's data sets, checked."""
    out, stage = [], config.stages[name]
    if not stage.data or len(stage.weights or stage.data) != len(stage.data):
        raise InputError(
            f"config.stages.{name}.data",
            found=f"{counted(len(stage.data), 'data set')}, "
            f"{counted(len(stage.weights), 'weight')}",
            expected="one or more, rows.json=folder of pictures, and as many weights or none",
            fix=f"pass --config.stages.{name}.data=\"('rows.json=folder',)\"",
        )
    for item in stage.data:
        rows, equals, pictures = item.partition("=")
        if not equals:
            raise InputError(
                f"config.stages.{name}.data",
                found=repr(item),
                expected="rows.json=folder of pictures",
                fix="name the folder",
            )
        found = Conversations(rows, pictures, skip_broken=config.skip_broken)
        if found.broken:
            print(
                f"{rows}: {counted(len(found.broken), 'broken row')} left out, "
                f"the first: {found.broken[0]}"
            )
        if found.openings:
            print(
                f"{rows}: of {counted(found.openings, 'row')} the first message is left out, "
                "as LLaVA does"
            )
        out.append(found)
    return out


def start(config: ConfigDict, folder: Path | None) -> tuple[Model, Processor]:
    """The model that the next stage trains: the last stage's, a given one, or a new one."""
    alone = tuple(config.mesh) == (1, 1) and jax.process_count() == 1
    mesh = None if alone else make_mesh(*config.mesh)
    if folder is not None or config.model:
        return converters.load(folder or config.model, mesh=mesh)
    required(config, "llm", "encoder")
    return converters.create(
        config.llm,
        config.encoder,
        {"kind": config.connector, **(config.options or {})},
        aux=config.aux,
        aspect=config.aspect,
        seed=config.seed,
        mesh=mesh,
    )


def check(config: ConfigDict, stages: Sequence[str], model: Model) -> None:
    """Raises InputError for a stage that this model can't have; before the first one is trained."""
    names = [name_of(path) for path, _ in nnx.to_flat_state(nnx.state(model))]
    for name in stages:
        stage = config.stages[name]
        adapted: list[str] = []
        if stage.lora.rank:
            adapted = adapters(model, LoRAConfig(**stage.lora))
        check_groups(groups(stage), [*names, *adapted], f"config.stages.{name}.train")
        staged(model.config, stage, name)
        Optim(1, stage.warmup, stage.schedule, stage.clip).rate(1.0)


def groups(stage: ConfigDict) -> list[Group]:
    """What a stage trains."""
    return [Group(pattern, rate, stage.weight_decay) for pattern, rate in stage.train]


def staged(config: ModelConfig, stage: ConfigDict, name: str) -> ModelConfig:
    """A model's config with what a stage has of its own: how pictures are cut, switches."""
    if stage.aspect not in ("", "pad", "crop"):
        raise InputError(
            f"config.stages.{name}.aspect",
            found=repr(stage.aspect),
            expected="'pad', 'crop', or '' for the model's",
            fix="choose one",
        )
    branches, switches = [], stage.connector.to_dict()
    for branch in config.branches:
        path: Any = branch.architecture
        known = getattr(path.connector, "switches", ())
        if unknown := sorted(set(switches) - set(known)):
            raise InputError(
                f"config.stages.{name}.connector.{unknown[0]}",
                found="no such switch",
                expected=", ".join(known) or f"none: the connector of {branch.name!r} has none",
                fix="remove it",
            )
        if stage.aspect:
            images = dataclasses.replace(path.images, aspect=stage.aspect)
            path = dataclasses.replace(path, images=images)
        connector = dataclasses.replace(path.connector, **switches)
        path = dataclasses.replace(path, connector=connector)
        branches.append(dataclasses.replace(branch, architecture=path))
    return dataclasses.replace(config, branches=tuple(branches))


def switch(model: Model, config: ModelConfig) -> None:
    """Gives the connectors the options of a config."""
    for branch in config.branches:
        model.branches[branch.name].connector.config = branch.architecture.connector


def train(
    config: ConfigDict,
    name: str,
    model: Model,
    processor: Processor,
    data: list[Conversations],
    folder: Path,
) -> None:
    """One stage, from its first step or where it was stopped, to a folder of its model."""
    stage, mesh = config.stages[name], mesh_of(model)
    own, rows = model.config, [len(x) for x in data]
    here = staged(own, stage, name)
    switch(model, here)
    batches = Batches(
        list(zip(data, stage.weights or rows, strict=True)),
        dataclasses.replace(processor, config=here, template=stage.template or processor.template),
        batch=stage.batch,
        accumulate=stage.accumulate,
        seed=config.seed,
        steps=stage.steps or None,
        length=min(stage.length, processor.config.llm.context),
        frames=stage.frames,
        by_modality=stage.by_modality,
        window=stage.window,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        multiple=max(row_shards(mesh) // jax.process_count(), 1) if mesh else 1,
    )
    if stage.lora.rank:
        add_lora(model, LoRAConfig(**stage.lora), seed=config.seed)
    again = " (fewer than a step takes: they are repeated)" if sum(rows) < batches.size else ""
    print(
        f"{name}: {counted(sum(rows), 'row')}{again}, "
        f"{counted(batches.steps, 'step')} of {batches.size:,}"
    )
    model = fit(
        model,
        batches.to_iter,
        groups(stage),
        Optim(batches.steps, stage.warmup, stage.schedule, stage.clip),
        folder,
        config=settings(config, name, data),
        options=Options(
            dtype=config.dtype,
            remat=config.remat,
            sequence=config.sequence,
            save_every=config.save_every,
            keep=config.keep,
            log_every=config.log_every,
            profile=config.profile,
            seed=config.seed,
        ),
        trackers=trackers(config, name, folder),
    )
    if batches.broken:
        print(
            f"{counted(len(batches.broken), 'broken row')} replaced, the first: {batches.broken[0]}"
        )
    switch(model, own)
    with together(f"writing of {name}"):  # by the first; all read it in the next stage
        converters.export(merge_lora(model), folder / "model")


MODEL = ("model", "llm", "encoder", "aux", "connector", "options", "aspect", "dtype", "seed")


def settings(config: ConfigDict, name: str, data: list[Conversations]) -> dict[str, Any]:
    """What a stage's states depend on."""
    model = {key: config[key] for key in MODEL}
    return {**model, "rows": [len(x) for x in data]} | {
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
