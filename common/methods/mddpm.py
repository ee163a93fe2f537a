"""mDDPM: pDDPM trained on slices with filtered rectangles (Iqbal et al., MLMI 2023).

Random rectangles of a slice are replaced by what is left of it when its low or its high frequencies are taken out, and
the network learns to repair them along with the patch that is noised. Nothing is masked at test time: the detector is
`PDDPM`. arXiv 2305.19867.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..detection.method import foreground_of
from ..errors import SettingError
from .pddpm import PDDPM, Box, PDDPMObjective, inside_box

Content = Literal["high", "low", "zero"]
CONTENTS = ("high", "low", "zero")
HALF_WIDTHS = (2, 10)  # of the square of frequencies that is taken out, or left
MARGIN = 5  # rows and columns at the rim of the brain where no rectangle begins or ends


class MDDPMObjective(PDDPMObjective):
    """Mean of |x_hat - x| over the pixels that were noised or replaced.

    Args:
        detector: the `PDDPM` whose network is trained.
        kinds: what stands in the rectangles of a slice, one of these with equal chances: "high" or "low" frequencies of
            the slice, as in the published program; or "zero".
        counts: fewest and most rectangles of a slice, evenly drawn; (0, 5) as published.
        smallest_side: of a rectangle in pixels; by default, as published, half of the largest, which is 18 % of the
            brain's extent.
        inpaint: the published loss, a mean over all pixels: outside of the noised patch the input, rectangles and all,
            counts as the output. No gradient comes from there; the rectangles teach only where they meet the patch.
        settings: `fixed_grid` and `max_timestep`, see `PDDPMObjective`.

    Raises SettingError for kinds or counts that are none.
    """

    def __init__(
        self,
        detector: PDDPM,
        kinds: Sequence[Content] = ("high", "low"),
        counts: Sequence[int] = (0, 5),
        smallest_side: int | None = None,
        inpaint: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(detector, **settings)
        if not kinds or not set(kinds) <= set(CONTENTS):
            raise SettingError("kinds", f"{list(kinds)} are no contents", f"choose from {', '.join(CONTENTS)}")
        if len(counts) != 2 or not 0 <= counts[0] <= counts[1]:
            raise SettingError("counts", f"{list(counts)} are no range", "give the fewest and the most, from 0")
        self.kinds = kinds
        self.counts = counts
        self.smallest_side = smallest_side
        self.inpaint = inpaint

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`; rectangles, patches and noise are drawn from the global generator, for each sample its own."""
        foreground = foreground_of(images) if foreground is None else foreground
        corrupted, replaced = self.corrupt(images, foreground)
        t = torch.randint(self.max_timestep, (len(images),), device=images.device)
        mask = torch.stack([inside_box(self.random_box(images.shape[2:]), images) for _ in images])
        return {"loss": self.repair_loss(images, corrupted, replaced, self.detector.noise(images, t), mask, t)}

    def repair_loss(
        self, images: Tensor, corrupted: Tensor, replaced: Tensor, noise: Tensor, mask: Tensor, t: Tensor
    ) -> Tensor:
        """The loss of given rectangles, noise and patches: slices (B, C, H, W) in [0, 1] and `corrupted` from them,
        where they were replaced (B, 1, H, W) bool, and the patches (B, 1, H, W) in {0, 1}."""
        target, x0 = images * 2 - 1, corrupted * 2 - 1
        output = self.detector.predict(x0, noise, mask, t)
        if self.inpaint:
            return F.l1_loss(torch.where(mask == 1, output, x0), target)
        repaired = ((mask == 1) | replaced).expand_as(output)
        return F.l1_loss(output[repaired], target[repaired])

    def corrupt(self, images: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (B, C, H, W) in [0, 1] with rectangles, not clipped, and where they are (B, 1, H, W) bool.

        Rectangles may overlap; what stands in them comes from the whole slice. Slices of a brain that is too small for
        a rectangle stay as they are.
        """
        corrupted, replaced = images.clone(), torch.zeros_like(foreground)
        for index, (image, brain) in enumerate(zip(images, foreground, strict=True)):
            boxes = self.random_boxes(brain[0])
            if not boxes:
                continue
            kind = self.kinds[int(torch.randint(len(self.kinds), ()))]
            content = contents(image, kind, int(torch.randint(HALF_WIDTHS[0], HALF_WIDTHS[1] + 1, ())))
            for left, top, right, bottom in boxes:
                corrupted[index, :, top:bottom, left:right] = content[:, top:bottom, left:right]
                replaced[index, :, top:bottom, left:right] = True
        return corrupted * foreground, replaced & foreground

    def random_boxes(self, brain: Tensor) -> list[Box]:
        """Rectangles within the extent of a brain, (H, W) bool."""
        extents = [brain.any(dim=axis).nonzero() for axis in (0, 1)]  # of columns, of rows
        if not all(len(extent) for extent in extents):
            return []
        first, last = ([int(extent[i]) for extent in extents] for i in (0, -1))
        lengths = [b - a + 1 for a, b in zip(first, last, strict=True)]
        if not all(len(corners(length)) for length in lengths):
            return []
        boxes = []
        for _ in range(int(torch.randint(self.counts[0], self.counts[1] + 1, ()))):
            start = [a + draw(corners(length)) for a, length in zip(first, lengths, strict=True)]
            side = [draw(sides(length, self.smallest_side)) for length in lengths]
            boxes.append((start[0], start[1], start[0] + side[0], start[1] + side[1]))
        return boxes


def contents(image: Tensor, kind: Content, half_width: int) -> Tensor:
    """What stands in the rectangles of an image (C, H, W), same: the low frequencies, the others, or 0."""
    if kind == "zero":
        return torch.zeros_like(image)
    low = low_pass(image, half_width)
    return low if kind == "low" else image - low


def low_pass(image: Tensor, half_width: int) -> Tensor:
    """The frequencies -w ... w - 1 along both axes, of w = half_width, real part: (..., H, W) -> same.

    The square is not symmetric, as published; nothing is clipped.
    """
    spectrum = torch.fft.fftshift(torch.fft.fft2(image), dim=(-2, -1))
    kept = torch.zeros_like(spectrum)
    rows, columns = (slice(max(n // 2 - half_width, 0), n // 2 + half_width) for n in image.shape[-2:])
    kept[..., rows, columns] = spectrum[..., rows, columns]
    return torch.fft.ifft2(torch.fft.ifftshift(kept, dim=(-2, -1))).real


def largest_side(length: int) -> int:
    """Of a rectangle in a brain of so many rows or columns: 18 %."""
    return int(length / 10 * 1.8)


def sides(length: int, smallest: int | None) -> range:
    """Sides that a rectangle may have along an axis."""
    largest = largest_side(length)
    return range(min(largest, largest // 2 if smallest is None else smallest), largest + 1)


def corners(length: int) -> range:
    """Where a rectangle may begin along an axis, from the brain's first row or column on; empty in a small brain."""
    return range(MARGIN, length - MARGIN - largest_side(length))


def draw(values: range) -> int:
    """One of them, from the global generator."""
    return values[int(torch.randint(len(values), ()))]
