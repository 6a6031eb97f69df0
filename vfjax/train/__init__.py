"""Training: what trains and how fast, one compiled step, the loop with its state on disk."""

from vfjax.nn.lora import LoRA, LoRAConfig, adapters, add_lora, merge_lora
from vfjax.train.checkpoint import Checkpoints, same_config
from vfjax.train.loop import Options, fit
from vfjax.train.optim import Group, Optim
from vfjax.train.record import TensorBoard, WandB, report
from vfjax.train.step import State, answer_loss, check_groups, gradients, init, make_step, split
from vfjax.train.stop import Stopped

__all__ = [
    "Checkpoints",
    "Group",
    "LoRA",
    "LoRAConfig",
    "Optim",
    "Options",
    "State",
    "Stopped",
    "TensorBoard",
    "WandB",
    "adapters",
    "add_lora",
    "answer_loss",
    "check_groups",
    "fit",
    "gradients",
    "init",
    "make_step",
    "merge_lora",
    "same_config",
    "report",
    "split",
]
