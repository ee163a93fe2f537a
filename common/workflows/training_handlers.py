"""What the trainers need beside MONAI's handlers: EMA, clipping, resuming, and weights at the end."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any, cast
from zipfile import is_zipfile

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from ignite.handlers.tqdm_logger import ProgressBar
from monai.engines import IterationEvents
from monai.handlers import CheckpointLoader
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Subset

from ..detection.volume import VolumeDetector
from ..files import replacing
from ..networks.latent_space import LatentSpace
from ..outputs import check_file
from ..weights import load_into, save_weights
from .distributed import is_main_process

SLICES_FOR_SCALE = 1024


class ExponentialMovingAverage(AveragedModel):
    """Average of an objective's weights over about 1 / (1 - decay) steps, over fewer in the beginning; of one for 0.

    `module` is the averaged objective. The number of steps is part of the state, so a resumed run goes on alike.
    """

    module: Any

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        def average(mean: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
            return torch.lerp(current, mean, min(decay, (1 + float(steps)) / (10 + float(steps))))

        super().__init__(network, avg_fn=average)
        self.network = [network]  # in a list, so that it is not a submodule

    def attach(self, engine: Engine) -> None:
        """Add the handler to a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    def update(self, engine: Engine) -> None:
        """Take the current weights in."""
        self.update_parameters(self.network[0])


class GradientClipping:
    """Clip the norm of all gradients of a network before each optimizer step; None lets them be."""

    def __init__(self, network: nn.Module, max_norm: float | None = 1.0) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Add the handler to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip."""
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class Checkpoints:
    """Save everything after each epoch, keep the newest, and resume from it when training starts again.

    Args:
        save_dir: folder of the checkpoints; they appear whole or not at all.
        state: what has a state dict: network, average, optimizer, lr_scheduler. The trainer is added.
    """

    def __init__(self, save_dir: str, state: dict[str, Any]) -> None:
        self.save_dir = Path(save_dir)
        self.state = state

    def attach(self, engine: Engine) -> None:
        """Add the handler to a trainer."""
        self.state = {**self.state, "trainer": engine}
        save = Checkpoint(self.state, self._write, score_function=lambda e: e.state.epoch, score_name="epoch")
        engine.add_event_handler(Events.EPOCH_COMPLETED, save)
        engine.add_event_handler(Events.STARTED, self)

    def _write(self, checkpoint: Mapping[str, Any], filename: str, metadata: object = None) -> None:
        # MONAI's CheckpointSaver removes the old file before it writes the new one, and that not in one piece
        if not is_main_process():
            return
        path = self.save_dir / filename
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
        for older in self._found():
            if older != path:
                older.unlink()

    def _found(self) -> list[Path]:
        return sorted(self.save_dir.glob("checkpoint_epoch=*.pt"), key=_epoch)

    def __call__(self, engine: Engine) -> None:
        """Load the newest checkpoint, if there is one."""
        if found := self._found():
            logging.getLogger(__name__).info("resuming from %s", found[-1])
            load = CheckpointLoader(str(found[-1]), self.state, map_location="cpu")  # type: ignore[arg-type]
            load(engine)


def _epoch(path: Path) -> int:
    found = re.search(r"epoch=(\d+)", path.name)
    return int(found[1]) if found else -1


class _WhenCompleted:
    """A handler that writes weights when an `ObjectiveTrainer` completes, from one process only."""

    path: str

    def attach(self, engine: Engine) -> None:
        """Add the handler to a trainer."""
        engine.add_event_handler(Events.STARTED, self.check)
        engine.add_event_handler(Events.COMPLETED, self)

    def check(self, engine: Engine) -> None:
        """Before the first epoch: only weights are written over. Raises OutputError."""
        check_file(Path(self.path), is_zipfile(self.path), "a file of weights")

    def __call__(self, engine: Any) -> None:
        """Write."""
        if is_main_process():
            self.write(engine.average.module, engine.data_loader.dataset)

    def write(self, objective: Any, dataset: Dataset) -> None:
        """Write what a subclass is for, of the averaged objective and the training data."""
        raise NotImplementedError


class SaveWeights(_WhenCompleted):
    """Write the bundle's weights: the network with the averaged detector, in half precision.

    Args:
        network: the `VolumeDetector` whose `detector` the objective trains.
        path: weights file.
    """

    def __init__(self, network: VolumeDetector, path: str) -> None:
        self.network = network
        self.path = path

    def write(self, objective: Any, dataset: Dataset) -> None:
        """Write the file."""
        state = self.network.state_dict()
        averaged = objective.detector.state_dict()
        state.update({f"detector.{name}": value for name, value in averaged.items()})
        save_weights(state, self.path)


class SaveAutoencoder(_WhenCompleted):
    """Write a latent space with the averaged autoencoder, its scale fitted on training slices.

    Up to `SLICES_FOR_SCALE` slices at even distances are used.

    Args:
        latent_space: holds the autoencoder that the objective trains.
        path: weights file.
    """

    def __init__(self, latent_space: LatentSpace, path: str) -> None:
        self.latent_space = latent_space
        self.path = path

    def write(self, objective: Any, dataset: Dataset) -> None:
        """Fit the scale and write the file."""
        space = self.latent_space
        space.autoencoder.load_state_dict(objective.autoencoder.state_dict())
        device, count = space.scale.device, len(cast(Sized, dataset))
        some = Subset(dataset, range(0, count, -(-count // SLICES_FOR_SCALE)))
        means, foregrounds = [], []
        with torch.no_grad():
            for batch in DataLoader(some, batch_size=64):
                means.append(space.autoencoder.encode(batch["image"].to(device) * 2 - 1)[0])
                foregrounds.append(batch["foreground"].to(device))
        space.fit_scale(torch.cat(means), torch.cat(foregrounds))
        save_weights(space.state_dict(), self.path)


def load_latent_space(latent_space: LatentSpace, path: str, device: torch.device) -> LatentSpace:
    """The latent space with the weights of the autoencoder stage. Raises BundleError."""
    load_into(latent_space, path)
    return latent_space.to(device)


class EpochProgress(ProgressBar):
    """Progress bar of a trainer, one bar an epoch, with the running loss."""

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        """Add the bar to a trainer."""
        if is_main_process():
            super().attach(engine, output_transform=lambda output: {"loss": output["loss"].item()})
