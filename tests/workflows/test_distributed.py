"""One process of a group on the CPU, and none at all."""

from __future__ import annotations

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.workflows.distributed import distribute, is_main_process, local_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what processes without a GPU do")


@pytest.fixture
def group(monkeypatch):
    """The variables of `torchrun` for the only process of a group, which is left afterwards."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    store, start = dist.HashStore(), dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda backend: start(backend, store=store, rank=0, world_size=1))
    yield
    idist.finalize()
    if dist.is_initialized():  # ignite leaves a group that it did not know of when it was first asked
        dist.destroy_process_group()


def test_without_torchrun_this_is_the_main_process():
    assert is_main_process()


def test_group_is_joined_once(group):
    assert local_device() == local_device() == torch.device("cpu")
    assert dist.get_backend() == "gloo"
    assert is_main_process()


def test_another_process_writes_nothing(group, monkeypatch):
    local_device()
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert not is_main_process()


def test_network_learns_as_it_would_alone(group):
    network = nn.Linear(3, 1)
    weight = network.weight.detach().clone()
    x = torch.arange(6.0).reshape(2, 3)
    shared = distribute(network, local_device())
    assert isinstance(shared, DistributedDataParallel)
    shared(x).sum().backward()
    alone = nn.functional.linear(x, weight.requires_grad_())
    alone.sum().backward()
    assert torch.equal(network.weight.grad, weight.grad)
