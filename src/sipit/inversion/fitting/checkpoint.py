"""The state of a training on disk, so that an interrupted one goes on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sipit.storage import whole_file

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for a parameter


def resumed(checkpoint: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint if there is one; return the steps it had done."""
    if not checkpoint.is_file():
        return 0
    saved = load_file(checkpoint)
    network.load_state_dict({name[4:]: value for name, value in saved.items() if name.startswith("net.")})
    state = optimizer.state_dict()
    state["state"] = {
        int(i): {key: saved[f"opt.{i}.{key}"] for key in _MOMENTS}
        for i in {name.split(".")[1] for name in saved if name.startswith("opt.")}
    }
    optimizer.load_state_dict(state)
    return int(saved["step"])


def save_checkpoint(checkpoint: Path, step: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what a network and its optimizer are after some steps, whole or not at all."""
    tensors = {"step": torch.tensor(step)}
    tensors |= {f"net.{name}": value.contiguous() for name, value in network.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"opt.{i}.{key}": moments[key].contiguous() for key in _MOMENTS}
    with whole_file(checkpoint) as temporary:
        save_file(tensors, temporary)
