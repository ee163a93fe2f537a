"""Corruptions of healthy slices for cold diffusion: foreign texture and intensity bias within soft random shapes.

After DAG, the "disentangled anomaly generation" of DISYRE v2 (Naval Marimont et al., MICCAI 2024), with lesion sizes
for voxels of 2 mm. All lengths are in pixels, all intensities those of images in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SettingError
from ..recorded import Recorded

ELONGATION = 0.5  # largest logarithm of the ratio of a shape's sides
IRREGULARITY = 0.5  # of a blob's radius, times standard normal noise that is smooth on a scale of half the radius
CLUSTER_STD = 10.0  # of the shapes' centres in a cluster
SHARP = 0.3  # share of the shapes that stay sharp, as published
FLAT_WIDTH = (0.02, 0.15)  # range of intensities within a flat patch
DARKEST = 0.2  # of the shape's own mean: the level of the darkest flat patch


class Corruption(Recorded):
    """Draws what is done to each slice of a batch, all of it from the global generator.

    A slice stays clean, or it is changed in one or several places. In each, within a shape or a cluster of small ones,
    the texture is mixed with that of a foreign patch, the intensity is raised or lowered, or both, a third each. The
    foreign patch is of another slice of the batch, rolled, and stretched to the range of intensities that it replaces
    or, for `flat_share` of them, squeezed to a narrow range around a level of its own, as within a cavity or a tumour.

    Args:
        most_places: 1 to so many are drawn; published: 1. With little to restore a short training ends at the identity.
        size: smallest and largest diameter; of a rectangle the side of the square of the same area. Log-uniform.
        cluster_share: probability that a slice gets a cluster.
        cluster_count: fewest and most shapes of a cluster.
        cluster_size: as `size`, for the shapes of a cluster.
        max_blur: largest standard deviation of the Gaussian that softens the borders.
        clean_share: probability that a slice stays as it is, with severity 0; published: 0.
        texture_amount: smallest and largest share of the foreign patch, uniform; published: from 0.
        bias_amount: smallest and largest change of intensity, log-uniform; published: from 0, uniform.
        dark_share: probability that intensity is lowered rather than raised; published: 0.5.
        flat_share: probability that a foreign patch is flat; published: 0.
        levels: intensities of the classes that a change may be restricted to: those of the tissues.
        pseudo_count: a class of n of the N pixels of a shape is chosen with probability n / (N + pseudo_count), and
            where none is, all are changed. 1000 at 1 mm.

    Raises SettingError where a number is out of its range.
    """

    def __init__(
        self,
        most_places: int = 1,
        size: tuple[float, float] = (3.0, 22.0),
        cluster_share: float = 0.3,
        cluster_count: tuple[int, int] = (2, 5),
        cluster_size: tuple[float, float] = (3.0, 8.0),
        max_blur: float = 2.0,
        clean_share: float = 0.15,
        texture_amount: tuple[float, float] = (0.1, 1.0),
        bias_amount: tuple[float, float] = (0.05, 1.0),
        dark_share: float = 0.5,
        flat_share: float = 0.3,
        levels: Sequence[float] = (0.19, 0.37, 0.5, 0.62, 0.74),
        pseudo_count: float = 250.0,
    ) -> None:
        for name, (low, high), top in (
            ("size", size, math.inf),
            ("cluster_count", cluster_count, math.inf),
            ("cluster_size", cluster_size, math.inf),
            ("texture_amount", texture_amount, 1.0),
            ("bias_amount", bias_amount, 1.0),
        ):
            if not 0 < low <= high <= top:
                raise SettingError(name, f"{low} to {high} is no range", f"choose two rising numbers in (0, {top:g}]")
        for name, share in (
            ("cluster_share", cluster_share),
            ("clean_share", clean_share),
            ("dark_share", dark_share),
            ("flat_share", flat_share),
        ):
            if not 0 <= share <= 1:
                raise SettingError(name, f"{share} is no probability", "choose a number in [0, 1]")
        if most_places < 1 or max_blur < 0 or pseudo_count < 0 or not levels:
            fact = (
                f"most_places = {most_places}, max_blur = {max_blur}, pseudo_count = {pseudo_count}, levels = {levels}"
            )
            raise SettingError("Corruption", fact, "choose numbers of 0 or more, and at least one place and one level")
        self.most_places = most_places
        self.size, self.max_blur = size, max_blur
        self.cluster_share, self.cluster_count, self.cluster_size = cluster_share, cluster_count, cluster_size
        self.clean_share, self.dark_share, self.flat_share = clean_share, dark_share, flat_share
        self.texture_amount, self.bias_amount = texture_amount, bias_amount
        self.levels, self.pseudo_count = levels, pseudo_count

    def __call__(self, images: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
        """Corrupted slices and the severity of each, 0 to 1.

        images: (B, C, H, W) in [0, 1], 0 outside of the foreground; foreground: (B, 1, H, W) bool.
        Returns (B, C, H, W) in [0, 1], equal to the images outside of the foreground, and (B,). The severity is the
        largest share of foreign texture or change by the bias, in any of the places.
        """
        each = (len(images),)
        number = torch.randint(1, self.most_places + 1, each, device=images.device)
        number = number * (uniform(each, images) >= self.clean_share)
        corrupted, severity = images, torch.zeros(each, device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            for i in range(self.most_places):
                corrupted, new = self._corrupted_once(corrupted, images, foreground, number > i)
                severity = torch.maximum(severity, new)
        return corrupted, severity

    def _corrupted_once(
        self, images: Tensor, healthy: Tensor, foreground: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        each = (len(images),)
        shape = self.shapes(foreground) * column(chosen)
        kind = torch.randint(3, each, device=images.device)  # texture, bias, both
        amount = uniform(each, images, *self.texture_amount) * (kind != 1)
        textured = mixed(images, self._foreign_patch(images, healthy, shape), shape, amount)
        change = log_uniform(each, images, *self.bias_amount) * (kind != 0) * self._sign(images)
        corrupted = biased(textured, shape * self._range(textured, shape > 0), change)
        effective = (corrupted - textured).abs().amax(dim=(1, 2, 3))
        return corrupted, torch.maximum(amount * shape.amax(dim=(1, 2, 3)), effective)

    def shapes(self, foreground: Tensor) -> Tensor:
        """What share of each pixel is changed: (B, 1, H, W) bool -> float in [0, 1], 0 outside of the foreground.

        Rectangles, ellipses and blobs (smooth noise on an ellipse, thresholded), a third each, anywhere in it.
        """
        batch, _, height, width = foreground.shape
        cluster = uniform((batch, 1), foreground) < self.cluster_share
        number = torch.randint(self.cluster_count[0], self.cluster_count[1] + 1, cluster.shape).to(cluster.device)
        each = (batch, self.cluster_count[1], 1, 1)  # shapes, of which a slice has some
        active = torch.arange(each[1], device=cluster.device) < torch.where(cluster, number, 1)

        first = torch.multinomial(foreground.flatten(1).float() + 1e-9, 1)
        apart = CLUSTER_STD * torch.randn(2, batch, each[1], device=cluster.device)
        apart[..., 0] = 0
        centre_row, centre_column = (c[..., None, None] for c in (first // width + apart[0], first % width + apart[1]))
        rows = torch.arange(height, device=cluster.device)[:, None] - centre_row
        columns = torch.arange(width, device=cluster.device) - centre_column

        diameter = torch.where(
            column(cluster),
            log_uniform(each, foreground, *self.cluster_size),
            log_uniform(each, foreground, *self.size),
        )
        stretch = uniform(each, foreground, -ELONGATION / 2, ELONGATION / 2).exp()
        angle = uniform(each, foreground, 0, torch.pi)
        u = (angle.cos() * rows + angle.sin() * columns) * 2 / (diameter * stretch)
        v = (angle.cos() * columns - angle.sin() * rows) * 2 / (diameter / stretch)

        kind = torch.randint(3, each, device=cluster.device)
        radius = torch.where(kind == 0, torch.maximum(u.abs(), v.abs()), torch.hypot(u, v))
        radius = radius + (kind == 2) * IRREGULARITY * _smooth_noise(u, v)
        hard = ((radius <= 1) & active[..., None, None]).any(dim=1, keepdim=True)
        sigma = uniform((batch,), foreground, 0, self.max_blur) * (uniform((batch,), foreground) >= SHARP)
        return blurred(hard.float(), sigma) * foreground

    def _foreign_patch(self, images: Tensor, healthy: Tensor, shape: Tensor) -> Tensor:
        each, inside = (len(images), 1, 1, 1), shape > 0
        low, high = _extremes(images, inside)
        mean = (images * shape).sum(dim=(2, 3), keepdim=True) / shape.sum(dim=(2, 3), keepdim=True).clamp(min=1e-6)
        darker = mean * uniform(each, images, DARKEST, 1)
        brighter = mean + (1 - mean) * uniform(each, images)
        level = torch.where(column(self._sign(images)) < 0, darker, brighter)
        half = uniform(each, images, *FLAT_WIDTH) / 2
        flat = uniform(each, images) < self.flat_share
        return stretched(
            _rolled(healthy), inside, torch.where(flat, level - half, low), torch.where(flat, level + half, high)
        )

    def _range(self, images: Tensor, inside: Tensor) -> Tensor:
        classes = nearest(images, self.levels)
        probability = class_probability(classes, inside, len(self.levels), self.pseudo_count)
        return range_mask(classes, torch.rand_like(probability) < probability)

    def _sign(self, images: Tensor) -> Tensor:
        return torch.where(uniform((len(images),), images) < self.dark_share, -1.0, 1.0)


# --- what is drawn above, given its numbers ---


def mixed(images: Tensor, patch: Tensor, shape: Tensor, amount: Tensor) -> Tensor:
    """Foreign texture: x (1 - a m) + p a m, for images and patches (B, C, H, W), shapes (B, 1, H, W), amounts (B,)."""
    weight = column(amount) * shape
    return images * (1 - weight) + patch * weight


def stretched(patch: Tensor, inside: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The patch with its range of intensities inside, (B, 1, H, W) bool, brought to low ... high, (B, C, 1, 1)."""
    least, most = _extremes(patch, inside)
    return ((patch - least) / (most - least + 1e-3) * (high - low) + low).clamp(0, 1)


def biased(images: Tensor, shape: Tensor, amount: Tensor) -> Tensor:
    """Intensity bias: x + a b, clipped to [0, 1]; amounts (B,) are below 0 where it gets darker."""
    return (images + column(amount) * shape).clamp(0, 1)


def nearest(images: Tensor, levels: Sequence[float]) -> Tensor:
    """Index of the nearest level of each pixel: (B, C, H, W) -> int64."""
    return (images[..., None] - torch.tensor(levels).to(images)).abs().argmin(dim=-1)


def class_probability(classes: Tensor, inside: Tensor, number: int, pseudo_count: float) -> Tensor:
    """n_k / (N + pseudo_count) of the pixels inside: (B, C, H, W) and (B, 1, H, W) -> (B, C, number)."""
    counts = (F.one_hot(classes, number) * inside[..., None]).sum(dim=(2, 3))
    return counts / (counts.sum(dim=2, keepdim=True) + pseudo_count)


def range_mask(classes: Tensor, chosen: Tensor) -> Tensor:
    """Where the chosen classes are, softened by 1 pixel; everywhere where none is chosen.

    classes: (B, C, H, W) int64; chosen: (B, C, K) bool. Returns (B, C, H, W) in [0, 1].
    """
    chosen = chosen | ~chosen.any(dim=2, keepdim=True)
    mask = chosen.gather(2, classes.flatten(2)).view(classes.shape)
    return blurred(mask.float(), torch.ones(1, device=classes.device))


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """SciPy's Gaussian filter (border mirrored, cut at 4 sigma), each sample with its own; 0 leaves it as it is.

    x: (B, C, H, W); sigma: (B,) in pixels, or (1,) for all; at most a quarter of the shorter side.
    """
    height, width = x.shape[2:]
    rows = _blur_matrix(height, sigma.to(x.dtype))
    columns = rows if width == height else _blur_matrix(width, sigma.to(x.dtype))
    return rows @ x @ columns.mT


def uniform(size: Sequence[int], like: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Numbers from low to high, of a size, on the device of a tensor."""
    return low + (high - low) * torch.rand(*size, device=like.device)


def log_uniform(size: Sequence[int], like: Tensor, low: float, high: float) -> Tensor:
    """As `uniform`, in the logarithm."""
    return uniform(size, like, math.log(low), math.log(high)).exp()


def column(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _blur_matrix(size: int, sigma: Tensor) -> Tensor:
    i = torch.arange(size, device=sigma.device)
    sigma = sigma.view(-1, 1, 1, 1)
    # a pixel, and its mirror images beyond the first and beyond the last one
    distance = torch.stack([i[:, None] - i, i[:, None] + i + 1, 2 * size - 1 - i[:, None] - i]).abs()
    weight = (-0.5 * (distance / sigma.clamp(min=1e-3)) ** 2).exp() * (distance <= (4 * sigma + 0.5).floor())
    weight = weight.sum(dim=1, keepdim=True)
    return weight / weight.sum(dim=-1, keepdim=True)


def _smooth_noise(u: Tensor, v: Tensor) -> Tensor:
    """Standard normal on a grid of half a radius, bilinear between; u, v: (B, K, H, W) in radii; -1.5 to 1.5."""
    points = torch.stack([u, v], dim=-1).flatten(0, 1) / 2
    noise = torch.randn(len(points), 1, 9, 9, device=u.device).clamp(-1.5, 1.5)
    return F.grid_sample(noise, points, align_corners=True).view(u.shape)


def _rolled(images: Tensor) -> Tensor:
    """Of each slice another one of the batch, rolled by up to a quarter of its sides."""
    count, _, height, width = images.shape
    partner = (torch.arange(count) + torch.randint(1, max(count, 2), ())) % count
    rows, columns = (
        (torch.arange(size) + torch.randint(-(size // 4), size // 4 + 1, (count, 1))) % size for size in (height, width)
    )
    return images[partner[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _extremes(images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Least and most of each channel inside; 1 and 0 where nothing is."""
    return (
        torch.where(inside, images, 1).amin(dim=(2, 3), keepdim=True),
        torch.where(inside, images, 0).amax(dim=(2, 3), keepdim=True),
    )
