"""DISYRE: restoration of synthetically corrupted slices (Naval Marimont et al., ISBI 2024; v2 MICCAI 2024).

A network learns to undo corruptions of healthy slices, told how severe they are: cold diffusion, without any noise. At
test time a slice is taken for a corrupted one; how much the network changes it is the anomaly map. v2 asks for several
severities and averages the changes; v1 goes in several steps from the most severe to the least.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Generator, Tensor

from ..detection.method import AnomalyDetector, TrainingObjective, foreground_of, median
from ..diffusion.corruption import Corruption
from ..errors import SettingError
from ..networks.pixel_unshuffle_unet import size_divisor

INDICES, FIRST_BETA, LAST_BETA = 100, 0.001, 0.2
LOSSES: dict[str, Callable[..., Tensor]] = {
    "l1": F.l1_loss,
    "l2": F.mse_loss,
    "huber": partial(F.smooth_l1_loss, beta=0.1),
}


class DISYRE(AnomalyDetector):
    """Mean over severities of |x - P(x, severity)|, where P is the restored slice.

    One table of severities, rising with the index, serves training and detection; the published code reads it in the
    other direction at test time. The foreground's share of a window, by which that code weights the map, would be the
    size of the brain here, and is left out.

    Args:
        unet: `unet(x, index)` is added to x; the last layer of MONAI's U-Net starts at zero, and so does the change.
        num_steps: severities that are asked for, evenly spaced in the index.
        multi_step: v1: each step starts from the slice of the last one, mixed with its restoration.
        median_size: side of a median window over the map, odd; 1, as published, for none.

    Raises SettingError for a number of steps that the table does not have.
    """

    networks = ("unet",)

    severity: Tensor

    def __init__(
        self, unet: DiffusionModelUNet, num_steps: int = 4, multi_step: bool = False, median_size: int = 1
    ) -> None:
        super().__init__()
        self.unet = unet
        self.multi_step = multi_step
        self.median_size = median_size
        self.size_divisor = size_divisor(unet)
        self.register_buffer("severity", severity_table(), persistent=False)
        self.steps = trailing_steps(num_steps)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        x, change, restorations = image, torch.zeros_like(image), torch.zeros_like(image)
        for index, following in zip(self.steps, [*self.steps[1:], None], strict=True):
            restored = self.restored(x, torch.full((len(x),), index, device=x.device)) * foreground
            change, restorations = change + (x - restored).abs(), restorations + restored
            if self.multi_step:
                x = self.step(x, restored, index, following)
        reconstruction = x if self.multi_step else restorations / len(self.steps)
        anomaly_map = change.mean(dim=1, keepdim=True) / len(self.steps)
        return median(anomaly_map * foreground, self.median_size), reconstruction

    def restored(self, x: Tensor, index: Tensor) -> Tensor:
        """P(x, severity): slices (B, C, H, W) and indices of their severities (B,) -> (B, C, H, W), not clipped."""
        return x + self.unet(x, index)

    def step(self, x: Tensor, restored: Tensor, index: int, following: int | None) -> Tensor:
        """r x + (1 - r) P with r the ratio of the severities, within [0, 1]: the cold diffusion step; P at the end."""
        ratio = 0 if following is None else self.severity[following] / self.severity[index]
        return (ratio * x + (1 - ratio) * restored).clamp(0, 1)

    def index(self, severity: Tensor) -> Tensor:
        """The index of the nearest severity in the table; (B,) -> (B,) int64."""
        return (severity[:, None] - self.severity).abs().argmin(dim=1)


class DISYREObjective(TrainingObjective):
    """Restore a corrupted slice: mean over all pixels of the loss inside the foreground.

    Args:
        detector: whose network is trained, with its table of severities.
        corruption: what is done to the slices.
        loss: "l2" as published; "l1"; or "huber", l2 for errors below 0.1 and l1 above, in which faint corruptions
            weigh more beside strong ones.

    Raises SettingError for another loss.
    """

    def __init__(self, detector: DISYRE, corruption: Corruption, loss: Literal["l1", "l2", "huber"] = "l2") -> None:
        super().__init__()
        self.detector = detector
        self.corruption = corruption
        if loss not in LOSSES:
            raise SettingError("loss", f"{loss!r} is no loss", f"choose one of {', '.join(LOSSES)}")
        self.loss = LOSSES[loss]

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`; the corruptions are drawn from the global generator."""
        foreground = foreground_of(images) if foreground is None else foreground
        clean = images.clamp(0, 1) * foreground
        corrupted, severity = self.corruption(clean, foreground)
        return {"loss": self.restoration_loss(corrupted, severity, clean, foreground)}

    def restoration_loss(self, corrupted: Tensor, severity: Tensor, clean: Tensor, foreground: Tensor) -> Tensor:
        """The loss of given corruptions: slices (B, C, H, W) twice, severities (B,), foreground (B, 1, H, W) bool."""
        restored = self.detector.restored(corrupted, self.detector.index(severity)) * foreground
        return self.loss(restored, clean)


def severity_table() -> Tensor:
    """Square roots of the products of 1 - beta, rising from 0.0045 to 0.9995; (100,) float32."""
    beta = torch.linspace(FIRST_BETA, LAST_BETA, INDICES, dtype=torch.float64)
    return (1 - beta).cumprod(dim=0).sqrt().flip(0).float()


def trailing_steps(number: int) -> list[int]:
    """Indices from the last one down in even steps, for example 4: 99, 74, 49, 24. Raises SettingError."""
    if not 1 <= number <= INDICES:
        raise SettingError("num_steps", f"{number} steps of {INDICES} indices", f"choose 1 to {INDICES}")
    return [round(INDICES - k * INDICES / number) - 1 for k in range(number)]
