"""pDDPM: patched diffusion for unsupervised anomaly detection in brain MRI (Behrendt et al., MIDL 2023).

Only one patch of a slice is noised, and the network predicts it clean from its clean surroundings, in one call. Done
for every patch of a grid, that gives the whole slice. Despite the name there is no reverse process.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Generator, Tensor

from ..detection.method import AnomalyDetector, TrainingObjective, median
from ..diffusion.masked_ddim import cosine_alpha_bar
from ..diffusion.simplex import SimplexNoise
from ..errors import SettingError
from ..networks.pixel_unshuffle_unet import size_divisor

Box = tuple[int, int, int, int]  # x0, y0, x1, y1; x are columns, upper bounds are exclusive
NUM_TRAIN_TIMESTEPS = 1000
CROSS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])


class PDDPM(AnomalyDetector):
    """Every patch noised to index 499 of a cosine schedule and predicted in one call; the map is |x - x_hat|.

    Args:
        unet: `unet(x_t, t)` predicts x0; its images are in [-1, 1].
        patch_size: side of a patch in pixels; 48 at 96 px in the paper, which compares other sizes, too.
        overlap: patches are moved together until the last ends at the border, and averaged where they overlap. Without,
            H and W must be multiples of `patch_size`.
        t: 0-based index, 499 for the paper's 500 of 1000.
        erosion: pixels that are peeled off the foreground before the median; 3 at 96 px in the code.
        median_size: side of the median window, odd; the code's is 5 in three dimensions, this one stays in the slice.
    """

    networks = ("unet",)

    alpha_bar: Tensor

    def __init__(
        self,
        unet: DiffusionModelUNet,
        patch_size: int = 48,
        overlap: bool = False,
        t: int = 499,
        erosion: int = 3,
        median_size: int = 5,
    ) -> None:
        super().__init__()
        if not 0 <= t < NUM_TRAIN_TIMESTEPS:
            fact = f"index {t} is outside the schedule, 0 ... {NUM_TRAIN_TIMESTEPS - 1}"
            raise SettingError("t", fact, "choose an index within")
        if patch_size < 1:
            raise SettingError("patch_size", f"{patch_size} pixels are no patch", "choose a positive size")
        self.unet = unet
        self.patch_size = patch_size
        self.overlap = overlap
        self.t = t
        self.noise = SimplexNoise(mode="2d")  # one field a slice, which all its patches share
        self.erosion = erosion
        self.median_size = median_size
        divisor = size_divisor(unet)
        self.size_divisor = divisor if overlap else math.lcm(divisor, patch_size)
        self.register_buffer("alpha_bar", cosine_alpha_bar(NUM_TRAIN_TIMESTEPS), persistent=False)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        x0 = image * 2 - 1
        t = torch.full((len(x0),), self.t, device=x0.device)
        reconstruction = (self.reconstruct(x0, self.noise(x0, t, generators)) + 1) / 2
        error = (image - reconstruction).abs().mean(dim=1, keepdim=True)
        return median(error * eroded(foreground, self.erosion), self.median_size), reconstruction

    def reconstruct(self, x0: Tensor, noise: Tensor) -> Tensor:
        """x_hat in [-1, 1]: all patches of all slices in one batch, then their mean. (B, C, H, W) twice -> same."""
        boxes = patch_grid(x0.shape[2:], self.patch_size, self.overlap)
        inside = torch.stack([inside_box(box, x0) for box in boxes])  # (N, 1, H, W)
        mask = inside.repeat(len(x0), 1, 1, 1)  # the patches of a slice stand together
        t = torch.full((len(mask),), self.t, device=x0.device)
        x0, noise = (v.repeat_interleave(len(boxes), dim=0) for v in (x0, noise))
        output = self.predict(x0, noise, mask, t) * mask
        return output.unflatten(0, (-1, len(boxes))).sum(dim=1) / inside.sum(dim=0)

    def predict(self, x0: Tensor, noise: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """The network's x0 for images that are noised where mask (B, 1, H, W) is 1; t: (B,)."""
        alpha_bar = self.alpha_bar[t].to(x0.dtype).view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        return self.unet(torch.where(mask == 1, x_t, x0), t)


class PDDPMObjective(TrainingObjective):
    """Mean over all pixels of |x_hat - x|, one random patch of each slice noised to a random index.

    Outside the patch x_hat is x, so that only the patch is compared.

    Args:
        detector: the `PDDPM` whose network is trained.
        fixed_grid: the patch is one of the grid ("fixed sampling", the better one in the paper); False, the paper's
            ablation: it lies anywhere inside. The code's own random patches overflow the border and are cut there.
        max_timestep: indices are drawn from 0 ... max_timestep - 1; default: all, as published.
    """

    def __init__(self, detector: PDDPM, fixed_grid: bool = True, max_timestep: int | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.max_timestep = max_timestep or len(detector.alpha_bar)
        self.fixed_grid = fixed_grid

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`; indices, patches and noise are drawn from the global generator, for each sample its own."""
        x0 = images * 2 - 1
        t = torch.randint(self.max_timestep, (len(x0),), device=x0.device)
        mask = torch.stack([inside_box(self.random_box(x0.shape[2:]), x0) for _ in x0])
        return {"loss": self.patch_loss(x0, self.detector.noise(x0, t), mask, t)}

    def patch_loss(self, x0: Tensor, noise: Tensor, mask: Tensor, t: Tensor) -> Tensor:
        """The loss of given noise and patches; the gradient comes from the patch alone."""
        output = self.detector.predict(x0, noise, mask, t)
        return F.l1_loss(torch.where(mask == 1, output, x0), x0)

    def random_box(self, size: torch.Size) -> Box:
        """A box of the grid, or one that lies anywhere inside."""
        if self.fixed_grid:
            boxes = patch_grid(size, self.detector.patch_size, self.detector.overlap)
            return boxes[int(torch.randint(len(boxes), ()))]
        side = self.detector.patch_size
        y0, x0 = (int(torch.randint(max(n - side, 0) + 1, ())) for n in size)
        return x0, y0, min(x0 + side, size[1]), min(y0 + side, size[0])


def patch_grid(size: torch.Size | tuple[int, int], patch_size: int, overlap: bool) -> list[Box]:
    """Boxes that cover (H, W), row by row; without overlap the last ones are cut at the border."""
    starts = []
    for length in size:
        count = -(-length // patch_size)
        spread = overlap and count > 1
        starts.append([i * (length - patch_size) // (count - 1) if spread else i * patch_size for i in range(count)])
    height, width = size
    return [(x, y, min(x + patch_size, width), min(y + patch_size, height)) for y in starts[0] for x in starts[1]]


def inside_box(box: Box, like: Tensor) -> Tensor:
    """(1, H, W) in {0, 1}, of the size, dtype and device of an image (B, C, H, W)."""
    mask = like.new_zeros(1, *like.shape[2:])
    mask[:, box[1] : box[3], box[0] : box[2]] = 1
    return mask


def eroded(foreground: Tensor, iterations: int) -> Tensor:
    """Peel off pixels that are not surrounded by four others; (B, 1, H, W) bool, outside of which there is none."""
    cross = CROSS.to(foreground.device).view(1, 1, 3, 3)
    for _ in range(iterations):
        foreground = F.conv2d(foreground.float(), cross, padding=1) == 5
    return foreground
