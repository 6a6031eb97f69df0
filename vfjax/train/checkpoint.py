"""A stage's state on disk, or in a bucket: asynchronous, each process its shards.

Orbax writes it, but to S3, which it does not know: there `Objects` does.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from vfjax.atomic import lock, read_json, refuse_link, replacing, store_of
from vfjax.errors import InputError, shown
from vfjax.train.objects import Objects
from vfjax.train.optim import named
from vfjax.train.step import State

CONFIG = "config.json"


class Checkpoints:
    """The last states of a stage, in a folder of its own.

    The state is all there is: the data's order (`vfjax.data.Batches`) and what the model draws
    follow from the step. An unfinished save is no state, so that a killed run leaves
    the ones before.
    """

    def __init__(self, folder: Path, config: Mapping[str, object], *, keep: int = 2):
        """Opens the folder, or makes it.

        Args:
            folder: of this stage alone.
            config: JSON values that the states depend on.
            keep: states that are kept.

        Raises:
            InputError: the folder's states are of another config, another run writes them, it or
                what is in it is a link, or it holds folders that have a state's name, a number, and
                no config: Orbax would remove them.
        """
        self.folder = folder
        for path in (folder, *folder.glob("*")):
            refuse_link(path)
        odd = (
            [] if (folder / CONFIG).is_file() else [x for x in folder.glob("*") if x.name.isdigit()]
        )
        if odd:
            raise InputError(
                odd[0],
                found="a folder that no training made",
                expected="a new folder, or a stage's",
                fix="pass another --workdir",
            )
        same_config(folder, config)
        self.handle: int | None = None
        if jax.process_index() == 0:
            self.handle = os.open(folder, os.O_RDONLY)
            try:
                lock(self.handle, folder)
            except InputError:
                os.close(self.handle)
                raise
        self.objects: Objects | None = None
        known = store_of(folder)
        if known is not None and known.objects is not None:
            self.objects = Objects(known.objects(folder), keep)
            return
        decisions, latest = ocp.training.save_decision_policies, ocp.training.preservation_policies
        self.files = ocp.training.Checkpointer(
            shown(folder.absolute()),
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=latest.LatestN(keep),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        (self.objects or self.files).close()
        if self.handle is not None:
            os.close(self.handle)

    @property
    def step(self) -> int | None:
        """Of the newest state, None without one."""
        if self.objects:
            return self.objects.step
        return None if self.files.latest is None else self.files.latest.step

    def saved(self) -> int | None:
        """Of the newest state that is whole; `step` may still be on its way."""
        return max((int(x.name) for x in self.folder.glob("*") if x.name.isdigit()), default=None)

    def save(self, step: int, state: State) -> None:
        """Starts writing; returns once the arrays are copied."""
        if self.objects:
            with self._writing():
                self.objects.save(step, named(state))
            return
        self.files.save_checkpointables_async(step, {"state": named(state)})

    def restore(self, state: State) -> State:
        """The newest state, laid out as `state`, on whatever mesh that one is.

        Args:
            state: shapes and shardings; arrays are deleted, so that both are never there at once.

        Raises:
            InputError: it is unreadable, or its parameters are others.
        """
        old = named(state)
        like = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in old.items()
        }
        for x in old.values():
            x.delete()
        try:
            if self.objects:
                found = self.objects.restore(like)
            else:
                found = self.files.load_checkpointables(self.step, {"state": like})["state"]
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                self.folder / str(self.step),
                found=f"a state that does not fit ({str(error).splitlines()[0][:200]})",
                expected="the parameters that this stage trains",
                fix="train with the config it was saved with, or in another --workdir; if it is "
                "damaged, remove it, and the one before is taken",
            ) from error
        leaves = [found[name] for name in like]
        return jax.tree.unflatten(jax.tree.structure(state), leaves)

    def wait(self) -> None:
        """Returns when all is on disk."""
        if self.objects:
            with self._writing():
                self.objects.wait()
            return
        self.files.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise InputError(
                self.folder,
                found=f"a bucket that refuses a state ({str(error).splitlines()[0][:200]})",
                expected="room for it, and access",
                fix="mend it, then run again: the state before is whole",
            ) from error


def same_config(folder: Path, config: Mapping[str, object]) -> None:
    """Keeps a config in a new folder; raises InputError where an old one's differs in a key."""
    file, config = folder / CONFIG, json.loads(json.dumps(config))
    if file.is_file():
        known = read_json(file, "pass another --workdir")
        for key in sorted({*known, *config}):
            if known.get(key) != config.get(key):
                raise InputError(
                    f"{file}: {key}",
                    found=json.dumps(known.get(key)),
                    expected=f"{json.dumps(config.get(key))}, as in this run",
                    fix="pass another --workdir"
                    + (
                        ", or go on with the config of the folder"
                        if key in known
                        else ": the folder is of a version of vfjax without this key"
                    ),
                )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            part.write_text(json.dumps(config, indent=2))
