"""The preprocessing of a brain volume, as one MONAI `Compose` that is the same for training and inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.transforms import (
    Compose,
    CopyItemsd,
    CropForegroundd,
    DeleteItemsd,
    EnsureTyped,
    Orientationd,
    SpatialPadd,
)

from ..images.check import CheckVolumed
from ..recorded import Recorded
from .brain import BRAIN_VOLUME_ML, BrainMaskd
from .intensity import CorrectBiasFieldd, ScaleIntensityByForegroundd, SubtractZerod
from .load import LoadImageCheckedd
from .registration import RegisterToMNId
from .resample import ResampleForegroundd
from .tissue import StandardiseTissued

OF_TRAINING = ("spacing_mm", "percentile", "upper", "canvas", "channels", "bias_correction", "tissue_modes")


class BrainPreprocessing(Recorded, Compose):
    """Load, check, find the brain, zero, RAS, spacing (or MNI152), crop to the brain, scale, pad.

    In: `image`, a file or an image in memory, and `brain`, its mask, if there is one. Out: `image` (C, H, W, D)
    float32, brain in (0, 1], else exactly 0; and, on the input's own grid, `input` as it was loaded and `brain`
    (1, h, w, d) bool, with `brain_source`, where it comes from. `Invertd` undoes it on a map of the shape of `image`.
    `settings` are the arguments, for the record.

    Args:
        spacing_mm: isotropic spacing of the network's grid.
        percentile, upper: see `ScaleIntensityByForegroundd`.
        canvas: H and W are padded to at least this many voxels, the size of the slices in training.
        channels: modalities.
        register: bring the brain to MNI152, on whose grid the network then works; adds `to_mni`, (4, 4) RAS mm.
        strip: what to do with a skull, see `BrainMaskd`.
        brain_volume_ml: lowest and highest volume of a brain, see `BrainMaskd`; the default is of adults.
        bias_correction: divide by the bias field, which is kept as `bias_field`, see `CorrectBiasFieldd`.
        tissue_modes: of CSF, grey and white matter, to which a T1 brain is brought, see `StandardiseTissued`; those
            that it had are added as `tissue_modes`, with `contrast_order` and `vessel_share`.
    """

    def __init__(
        self,
        spacing_mm: float,
        percentile: float,
        upper: float,
        canvas: int,
        channels: int = 1,
        register: bool = False,
        strip: str | None = None,
        bias_correction: bool = False,
        brain_volume_ml: Sequence[float] = BRAIN_VOLUME_ML,
        tissue_modes: Sequence[float] | None = None,
    ) -> None:
        image, both = "image", ("image", "foreground")
        native = ResampleForegroundd(image, "foreground", (spacing_mm,) * 3)
        super().__init__(
            [
                LoadImageCheckedd(image),
                LoadImageCheckedd("brain", allow_missing_keys=True),
                EnsureTyped(image),
                CheckVolumed(image, channels),
                BrainMaskd(image, "brain", strip, brain_volume_ml),
                CopyItemsd(("image", "brain"), names=("input", "foreground")),
                SubtractZerod(image, "foreground"),
                Orientationd(both, axcodes="RAS", labels=None),
                RegisterToMNId(image, "foreground", spacing_mm) if register else native,
                CropForegroundd(both, source_key="foreground", allow_smaller=True),
                *([CorrectBiasFieldd(image, "foreground")] if bias_correction else []),
                ScaleIntensityByForegroundd(image, "foreground", percentile, upper),
                *([] if tissue_modes is None else [StandardiseTissued(image, tissue_modes)]),
                SpatialPadd(image, (canvas, canvas, -1)),
                DeleteItemsd("foreground"),
            ]
        )

    @property
    def preparation(self) -> dict[str, Any]:
        """The settings that a network is trained for, and that its weights therefore hold; no defaults."""
        return {name: value for name, value in self.changed_settings.items() if name in OF_TRAINING}
