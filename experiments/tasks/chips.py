"""Chips by their makers' data sheets, and meshes of them to compile for."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from vfjax import InputError
from vfjax.errors import counted
from vfjax.sharding import AXES

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, by its maker's data sheet: memory in GiB, the rest in units a second."""

    memory: float
    flops: float  # of bfloat16 products
    bytes: float  # of its memory
    network: float  # bytes to the devices beside it, all links

    def seconds(self, program: Mapping[str, float]) -> dict[str, float]:
        """The least time of a program's operations, memory traffic and collectives."""
        moved = sum(program[f"{kind} bytes"] for kind in COLLECTIVES)
        return {
            "operations": program["flops"] / self.flops,
            "memory": program["traffic"] / self.bytes,
            "network": moved / self.network,
        }

    def floor(self, program: Mapping[str, float]) -> float:
        """Seconds of a perfect program: its operations by shapes, or what it moves, each once."""
        return max(program["least flops"] / self.flops, program["least traffic"] / self.bytes)


CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9),
    "v5e": Chip(16, 197e12, 819e9, 200e9),
    "v5p": Chip(95, 459e12, 2765e9, 600e9),
    "v6e": Chip(32, 918e12, 1640e9, 448e9),
    "tpu7x": Chip(96, 1153.5e12, 3690e9, 600e9),  # a chip is two devices
    "a100": Chip(80, 312e12, 2039e9, 300e9),
    "h100": Chip(80, 989e12, 3350e9, 450e9),
    "h200": Chip(141, 989e12, 4800e9, 450e9),
}
"""TPUs by the names of their topologies, GPUs (80 and 141 GB, SXM) by ours."""
GPUS = ("a100", "h100", "h200")


def make_mesh(topology: str, model: int, fsdp: int) -> tuple[Mesh, Chip]:
    """A (data, fsdp, model) mesh of a topology's devices, and one of them.

    TPUs are compiled for by their own compiler. GPUs ("h100:8") stand on as many CPU devices: the
    parameters and collectives are those of any machine, XLA:CPU's temporaries too high, as its
    attention keeps the scores and its caches are copied.

    Raises:
        InputError: no such topology, no TPU compiler, or an axis that does not divide it.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor to share between two plans
    kind, _, shape = topology.partition(":")
    try:
        chip = CHIPS[kind]
        devices: Sequence[jax.Device]
        if kind in GPUS:
            with contextlib.suppress(RuntimeError):  # too late: there are as many as there are
                jax.config.update("jax_num_cpu_devices", int(shape))
            devices = jax.devices("cpu")[: int(shape)]
            if len(devices) < int(shape):
                raise ValueError(f"{len(devices)} CPU devices to stand for them")
        else:
            # A v4 chip's two cores are one device, as they are for who runs on it.
            one = {"chip_config_name": "megacore"} if kind == "v4" else {}
            devices = topologies.get_topology_desc(topology, platform="tpu", **one).devices
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            "config.topology",
            found=f"{topology!r} ({str(error).splitlines()[0][:120]})",
            expected=f"one of {', '.join(CHIPS)} with a shape, as v5e:4x4 or h100:8, and for TPUs "
            "their compiler",
            fix="correct it; pip install 'vfjax[tpu]' brings the compiler",
        ) from error
    if len(devices) % (model * fsdp):
        raise InputError(
            "config.model_axis, config.fsdp",
            found=f"{model} x {fsdp} for {counted(len(devices), 'device')}",
            expected="a divisor of their number",
            fix="choose others",
        )
    sizes = (len(devices) // (model * fsdp), fsdp, model)
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES)), chip


def stand_ins(mesh: Mesh) -> bool:
    """Whether CPU devices stand for those that are meant."""
    return mesh.devices.flat[0].platform == "cpu"
