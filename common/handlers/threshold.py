"""What a method fits on healthy validation slices when its training is over, before its weights are written."""

from __future__ import annotations

from torch.utils.data import DataLoader, Dataset

from .training import ExponentialMovingAverage, _WhenCompleted


class FitThreshold(_WhenCompleted):
    """Call the averaged detector's `fit_threshold`. Goes before `SaveWeights`, which then writes what was fitted.

    Args:
        average: of an objective whose `detector` has `fit_threshold(batches)`, with batches of healthy slices
            (B, C, H, W), which sets a buffer beside the calibration of the map.
        dataset: healthy validation slices.
        batch_size: slices at a time; the result does not depend on it.
    """

    def __init__(self, average: ExponentialMovingAverage, dataset: Dataset, batch_size: int = 16) -> None:
        self.average = average
        self.dataset = dataset
        self.batch_size = batch_size

    def write(self) -> None:
        """Fit."""
        detector = self.average.module.detector.eval()
        device = next(detector.parameters()).device
        detector.fit_threshold(batch["image"].to(device) for batch in DataLoader(self.dataset, self.batch_size))
