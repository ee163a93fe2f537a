"""The engines of all trainings, on an objective of one number; `test_training_handlers.py` tests what they write."""

from types import SimpleNamespace

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.workflows.slices import SliceDataset, in_order, shuffled
from common.workflows.training import AdamW, Bfloat16Inferer, ObjectiveEvaluator, ObjectiveTrainer, OneCycle

DEVICE = torch.device("cpu")


class Distance(nn.Module):
    """How far one number is from the mean of the images."""

    def __init__(self):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, foreground=None):
        difference = self.number - images[foreground].mean()
        return {"loss": difference.square(), "signed": difference}


def slices():
    image = torch.full((1, 4, 4, 6), 0.5)
    return SliceDataset([{"image": image}], lambda item: {"image": MetaTensor(item["image"])})


def make(folder, epochs=2, inferer=None, monitor=(), objective=None, **settings):
    """A trainer of 3 steps an epoch, and its evaluator."""
    torch.manual_seed(0)
    objective = objective or Distance()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    evaluator = ObjectiveEvaluator(in_order(slices(), batch_size=4), monitor=monitor)
    trainer = ObjectiveTrainer(
        device=DEVICE,
        max_epochs=epochs,
        epoch_length=3,
        train_data_loader=shuffled(slices(), batch_size=2),
        network=objective,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        inferer=inferer or SimpleInferer(),
        log_dir=str(folder),
        save=SimpleNamespace(attach=lambda engine: None),
        evaluator=evaluator,
        **settings,
    )
    return trainer, evaluator


def losses_of(trainer):
    """The losses of the steps, in the order of time."""
    losses = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
    trainer.run()
    return losses


def logged(folder):
    """The names and values in the TensorBoard logs of a folder."""
    log = EventAccumulator(str(folder))
    log.Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def test_steps_follow_the_clipped_gradient_and_the_schedule(tmp_path):
    trainer, _ = make(tmp_path, epochs=1)
    losses = losses_of(trainer)
    number, expected = 2.0, []
    for rate in (0.1, 0.09, 0.081):
        expected.append((number - 0.5) ** 2)
        number -= rate * min(2 * (number - 0.5), 1.0)  # the gradient, clipped to the norm 1
    assert losses == pytest.approx(expected, rel=1e-3)
    assert logged(tmp_path)["train_loss"] == pytest.approx(losses)


def test_plain_training_neither_clips_nor_averages(tmp_path):
    trainer, _ = make(tmp_path, epochs=2, max_norm=None, ema_decay=0.0)
    losses, number, expected = losses_of(trainer), 2.0, []
    for step in range(6):
        expected.append((number - 0.5) ** 2)
        number -= 0.1 * 0.9**step * 2 * (number - 0.5)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert trainer.average.module.number.item() == trainer.network.number.item() == pytest.approx(number, rel=1e-3)


@pytest.mark.parametrize("interval", [1, 2])
def test_the_average_is_validated_every_few_epochs(tmp_path, interval):
    trainer, evaluator = make(tmp_path, epochs=4, val_interval=interval, monitor=["signed"], ema_decay=0.5)
    seen = []
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append((e.state.epoch, dict(e.state.metrics))))
    trainer.run()
    assert [epoch for epoch, _ in seen] == list(range(interval, 5, interval))
    difference = trainer.average.module.number.item() - 0.5
    assert seen[-1][1] == pytest.approx({"val_loss": difference**2, "signed": difference}, rel=1e-3)
    assert difference != pytest.approx(trainer.network.number.item() - 0.5, rel=1e-3)
    assert logged(tmp_path)["val_loss"] == pytest.approx([metrics["val_loss"] for _, metrics in seen])


def test_checkpoints_are_beside_the_logs(tmp_path):
    make(tmp_path, epochs=2)[0].run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_epoch=2.pt"]


def test_what_is_frozen_is_not_optimised():
    objective = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 3))
    (group,) = AdamW(objective, lr=0.5).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in objective[1].parameters()]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0001)


class Sometimes(Distance):
    """Only the first step trains its other number."""

    def __init__(self):
        super().__init__()
        self.other, self.calls = nn.Parameter(torch.tensor(1.0)), 0

    def forward(self, images, foreground=None):
        losses, self.calls = super().forward(images, foreground), self.calls + 1
        return losses | {"loss": losses["loss"] + (self.other if self.calls == 1 else 0)}


def test_what_a_step_does_not_train_is_left_as_it_is(tmp_path):
    """It has no gradient then: of one of 0 Adam's moments would learn, and an old one would move it again."""
    trainer, _ = make(tmp_path, epochs=1, objective=Sometimes(), max_norm=None)
    trainer.run()
    assert trainer.network.other.grad is None
    assert trainer.network.other.item() == pytest.approx(0.9)
    assert trainer.network.number.grad is not None


def test_one_cycle_rises_to_the_learning_rate_and_ends_near_0():
    optimizer = AdamW(nn.Linear(2, 2), lr=0.3)
    schedule = OneCycle(optimizer, steps=100)
    rates, betas = [], []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        betas.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        if len(rates) < 100:
            schedule.step()
    assert max(rates) == rates[4] == pytest.approx(0.3)  # after 5 % of the steps
    assert rates[0] == pytest.approx(0.3 / 25)
    assert rates[-1] < 1e-5
    assert len(set(betas)) == 1


def test_the_best_epoch_is_that_of_the_lowest_loss(tmp_path):
    _, evaluator = make(tmp_path)
    for epoch, number in enumerate((1.5, 0.75, 1.0), start=1):
        evaluator.network.number.data.fill_(number)
        evaluator.run(epoch)
    assert evaluator.state.best_metric_epoch == 2
    assert evaluator.state.best_metric == pytest.approx(0.0625)


def test_training_and_validation_use_the_inferer(tmp_path):
    calls = []

    class Counting(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            calls.append(network.training)
            return super().__call__(inputs, network, *args, **kwargs)

    make(tmp_path, epochs=1, inferer=Counting())[0].run()
    assert calls == [True] * 3 + [False] * 2


def test_losses_under_bfloat16_are_float32_and_close():
    network = nn.Linear(8, 8)
    images = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    half = Bfloat16Inferer()(images, lambda x: network(x))
    assert half.dtype == torch.bfloat16
    losses = Bfloat16Inferer()(images, Squared(network))
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(Squared(network)(images).item(), rel=0.05)
    assert Bfloat16Inferer(enabled=False)(images, lambda x: network(x)).dtype == torch.float32


class Squared(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return nn.functional.mse_loss(self.network(x), torch.zeros_like(x))


def test_further_handlers_are_attached(tmp_path):
    attached = []
    extra = SimpleNamespace(attach=attached.append)
    trainer, _ = make(tmp_path, train_handlers=[extra])
    evaluator = ObjectiveEvaluator(in_order(slices(), batch_size=4), val_handlers=[extra])
    assert attached == [trainer, evaluator]


def test_in_a_process_group_the_same_steps_are_taken(tmp_path):
    alone = losses_of(make(tmp_path / "alone")[0])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        trainer, _ = make(tmp_path / "group")
        assert isinstance(trainer.network, DistributedDataParallel)
        assert losses_of(trainer) == alone
        assert trainer.average.state_dict().keys() == {"n_averaged", "module.number"}
    finally:
        idist.finalize()  # ignite remembers the group, so that destroying it is not enough
