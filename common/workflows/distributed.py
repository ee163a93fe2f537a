"""Training on several processes with `torchrun`: NCCL where there are GPUs, gloo where there are none."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def local_device() -> torch.device:
    """Join the process group of `torchrun`, and return this process's device."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def distribute(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The network on this process's device, its gradients averaged over the processes."""
    return DistributedDataParallel(
        network.to(device), device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=True
    )


def is_main_process() -> bool:
    """Whether this process writes files; True without `torchrun`."""
    return not dist.is_initialized() or dist.get_rank() == 0
