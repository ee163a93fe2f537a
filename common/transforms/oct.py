"""The preprocessing of retinal OCT: whole B-scans of one size, all of which is looked at."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from .brain import given_mask
from .head import HeadPreprocessing, ScaleGreyValuesd


class OCTPreprocessing(HeadPreprocessing):
    """`HeadPreprocessing` of stacks of B-scans (Wolleb et al., MICCAI 2024, on OCT2017): everything is foreground.

    Each B-scan is stretched to grey values 0 ... 255, those of `input` and of the reconstruction; `image` is in [0, 1].

    Args:
        size: H and W of the slices.
    """

    def __init__(self, size: int = 256) -> None:
        super().__init__(size, 1, WholeSlicesd("image"), ScaleGreyValuesd("image", "foreground"))


class WholeSlicesd(MapTransform):
    """Stretch each slice to 0 ... 255, and add the mask of all voxels, or take the one that is given.

    Slices are axial, in whatever order the axes are stored; one of a single grey value becomes 0.
    """

    mask_key = "brain"

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with the mask (1, H, W, D) bool and `brain_source`, "given" or "all".

        Raises SkullStripError for a mask that does not fit.
        """
        result = dict(data)
        image: MetaTensor = result[self.keys[0]]
        given = self.mask_key in result
        everything = MetaTensor(torch.ones_like(image.as_tensor(), dtype=torch.bool), meta=dict(image.meta))
        mask = given_mask(result[self.mask_key], image) if given else everything
        axial = int(np.abs(np.asarray(image.affine, dtype=float)[2, :3]).argmax())
        in_plane = [axis for axis in (1, 2, 3) if axis != axial + 1]
        low, high = image.amin(in_plane, keepdim=True), image.amax(in_plane, keepdim=True)
        stretched = 255 * (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)
        result[self.keys[0]] = stretched * mask.as_tensor()
        return result | {self.mask_key: mask, "brain_source": "given" if given else "all"}
