"""AdamW with its two moments in 8 bits, by bitsandbytes: 2 bytes a weight instead of 8.

Source: Dettmers et al. 2021, arXiv:2110.02861. Tensors of fewer than 4,096 elements keep moments in float32.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config import TrainConfig
from stage2_student.acceleration.requirements import require_package

EPS = 1e-8  # as of AdamW in `stage2_student.distributed.deepspeed_config`
_KEY = "train.optimizer: adamw_8bit"


def check_optimizer(train: TrainConfig) -> None:
    """Raise ValueError if this machine lacks the package of `train.optimizer`."""
    if train.optimizer == "adamw_8bit":
        require_package(_KEY, "bitsandbytes", "pip install bitsandbytes", "train.optimizer=adamw")


def make_optimizer(train: TrainConfig) -> Callable[[Sequence[dict[str, Any]]], Any] | None:
    """Return what makes the optimizer of parameter groups; None for AdamW, which DeepSpeed makes itself."""
    if train.optimizer == "adamw":
        return None
    adamw = importlib.import_module("bitsandbytes").optim.AdamW8bit
    values = {"lr": train.lr, "betas": train.betas, "eps": EPS, "weight_decay": train.weight_decay}
    return lambda groups: adamw(groups, **values)


def check_can_convert(train: TrainConfig, written_by: int, world: int) -> None:
    """Raise ValueError: DeepSpeed cannot convert 8-bit moments to those of another number of ranks."""
    if train.optimizer == "adamw_8bit":
        raise ValueError(
            f"{_KEY}: the newest checkpoint was written by {written_by} ranks, and there are {world} now; 8-bit "
            f"moments cannot be dealt anew. Resume with train.num_processes={written_by}"
        )
