"""How every bundle is trained: the engines know what is the same for all, a config gives them what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.metrics import Average
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, StatsHandler, TensorBoardStatsHandler, ValidationHandler
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from .distributed import distribute
from .slices import prepare_batch
from .training_handlers import Checkpoints, EpochProgress, ExponentialMovingAverage, GradientClipping


class Bfloat16Inferer(SimpleInferer):
    """Calls the network under bfloat16 autocast; unlike the engines' `amp` also on the CPU, where it is 2 to 3 times
    faster on processors with bfloat16 instructions. Not for inference: maps stay in float32.

    Args:
        enabled: False trains in float32.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The network's output, losses in float32."""
        device = next(network.parameters()).device.type if isinstance(network, nn.Module) else inputs.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.enabled):
            return network(inputs, *args, **kwargs)


class ObjectiveEvaluator(SupervisedEvaluator):
    """Validates a training by the mean of the losses over the validation slices; the lowest `val_loss` is the best.

    The `ObjectiveTrainer` that it is given to decides what is validated: see `validate`.

    Args:
        val_data_loader: batches of a `SliceDataset` or a `LatentDataset`.
        monitor: further losses of the objective, by their keys, to be logged.
        val_handlers: further handlers.
    """

    def __init__(
        self,
        val_data_loader: DataLoader,
        monitor: Sequence[str] = (),
        val_handlers: Sequence[Any] = (),
    ) -> None:
        super().__init__(
            device=torch.device("cpu"),
            val_data_loader=val_data_loader,
            network=nn.Identity(),
            prepare_batch=prepare_batch,
            key_val_metric={"val_loss": _mean_loss("loss")},
            additional_metrics={key: _mean_loss(key) for key in monitor},
            metric_cmp_fn=lambda loss, best: loss < best,  # MONAI takes the higher for the better
            val_handlers=[StatsHandler(iteration_log=False), *val_handlers],
            decollate=False,
        )

    def validate(self, objective: nn.Module, inferer: Inferer, device: torch.device, log_dir: str) -> None:
        """Choose the objective, how it is called, the device it is on, and the folder of the TensorBoard logs."""
        self.network, self.inferer, self.state.device = objective, inferer, device
        TensorBoardStatsHandler(log_dir=log_dir, iteration_log=False).attach(self)


def _mean_loss(key: str) -> Average:
    return Average(output_transform=lambda output: output["pred"][key].item())


class ObjectiveTrainer(SupervisedTrainer):
    """Minimises the key `loss` of a `TrainingObjective` on slices.

    `average`, an exponential moving average of the weights, is what is validated and written in the end. The learning
    rate changes after each step, and a checkpoint is written after each epoch, from which a training that is started
    again goes on. In a process group each process trains on its share of the batches.

    Args:
        device: where the objective is.
        max_epochs, epoch_length: epochs, and steps in each.
        train_data_loader: batches of a `SliceDataset` or a `LatentDataset`.
        network: the objective, on the device.
        optimizer, lr_scheduler: of the objective's parameters.
        inferer: how the objective is called.
        log_dir: folder of the TensorBoard logs.
        save: handler that writes the weights in the end.
        evaluator: validates every `val_interval` epochs.
        max_norm: that the gradients are clipped to; None for no clipping.
        ema_decay: see `ExponentialMovingAverage`; 0 for the weights themselves.
        train_handlers: further handlers.
        checkpoint_dir: folder of the checkpoints; by default `checkpoints` in `log_dir`.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        epoch_length: int,
        train_data_loader: DataLoader,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        inferer: Inferer,
        log_dir: str,
        save: Any,
        evaluator: ObjectiveEvaluator,
        val_interval: int = 1,
        max_norm: float | None = 1.0,
        ema_decay: float = 0.999,
        train_handlers: Sequence[Any] = (),
        checkpoint_dir: str | None = None,
    ) -> None:
        self.average = ExponentialMovingAverage(network, ema_decay)
        evaluator.validate(self.average.module, inferer, device, log_dir)
        state = {"network": network, "average": self.average, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            epoch_length=epoch_length,
            train_data_loader=train_data_loader,
            prepare_batch=prepare_batch,
            network=distribute(network, device) if dist.is_initialized() else network,
            optimizer=optimizer,
            loss_function=_total_loss,
            inferer=inferer,
            train_handlers=[
                self.average,
                GradientClipping(network, max_norm),
                LrScheduleHandler(lr_scheduler, print_lr=False, epoch_level=False),  # type: ignore[arg-type]
                ValidationHandler(val_interval, evaluator),
                EpochProgress(),
                TensorBoardStatsHandler(log_dir=log_dir, tag_name="train_loss", output_transform=_loss_of),
                Checkpoints(checkpoint_dir or str(Path(log_dir) / "checkpoints"), state),
                save,
                *train_handlers,
            ],
            decollate=False,
            optim_set_to_none=True,  # what a step does not train, Adam leaves as it is; of gradients of 0 it learns
        )


def _loss_of(output: dict[str, Any]) -> float:
    return output["loss"].item()


def _total_loss(losses: dict[str, Tensor], target: None) -> Tensor:
    return losses["loss"]


class AdamW(torch.optim.AdamW):
    """Of the parameters of an objective that are not frozen.

    Args:
        objective: what is trained.
        lr: learning rate, the highest of `OneCycle`.
        weight_decay: a step takes lr times this share off each parameter.
    """

    def __init__(self, objective: nn.Module, lr: float, weight_decay: float = 0.0001) -> None:
        super().__init__([p for p in objective.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)


class OneCycle(OneCycleLR):
    """Up to the learning rate of the optimizer and down to almost 0 (Smith and Topin 2019), the momentum constant.

    Args:
        optimizer: has one learning rate.
        steps: of the whole training.
        pct_start: share of the steps in which the rate rises.
    """

    def __init__(self, optimizer: Optimizer, steps: int, pct_start: float = 0.05) -> None:
        super().__init__(optimizer, optimizer.defaults["lr"], steps, pct_start=pct_start, cycle_momentum=False)
