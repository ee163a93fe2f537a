"""Fractal simplex noise, the coarse noise of AnoDDPM and pDDPM (OpenSimplex v1, K. Spencer, evaluated in one go)."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from ..recorded import Recorded

NORM = {2: 47.0, 3: 103.0}
LCG_FACTOR, LCG_STEP = np.uint64(6364136223846793005), np.uint64(1442695040888963407)
GRADIENTS_2D = ((5, 2), (2, 5), (-5, 2), (-2, 5), (5, -2), (2, -5), (-5, -2), (-2, -5))
GRADIENTS_3D = tuple(
    tuple(11 * s if axis == long else 4 * s for axis, s in enumerate(signs))
    for signs in ((-1, 1, 1), (1, 1, 1), (-1, -1, 1), (1, -1, 1), (-1, 1, -1), (1, 1, -1), (-1, -1, -1), (1, -1, -1))
    for long in range(3)
)


class SimplexNoise(Recorded):
    """N(y, x; t) = sum over k < octaves of persistence^k * simplex(x / f_k, y / f_k, t / f_k), f_k = frequency / 2^k.

    One independent field per sample and channel (the reference has one for a whole batch). It is neither of zero mean
    nor of unit variance: with the defaults its standard deviation is about 0.5 ("3d") or 0.6 ("2d").

    Args:
        octaves, persistence: 6 and 0.8 as published; the field of the equation is tested with others, too.
        frequency: wavelength of the first octave in pixels, whatever the size of the image; 64 as published.
        mode: "3d" is a plane of 3D noise at height t (AnoDDPM); "2d" ignores t and is 0 at pixel (0, 0) (pDDPM).
    """

    def __init__(
        self,
        octaves: int = 6,
        persistence: float = 0.8,
        frequency: float = 64.0,
        mode: Literal["2d", "3d"] = "3d",
    ) -> None:
        self.octaves = octaves
        self.persistence = persistence
        self.frequency = frequency
        self.mode = mode

    def __call__(self, x: Tensor, t: Tensor, generators: list[Generator] | None = None) -> Tensor:
        """Noise like x, (B, C, H, W), at the indices t, (B,); one generator per sample, else the global one."""
        channels = x.shape[1]
        if generators is None:
            seeds = torch.randint(2**62, (len(x), channels))
        else:
            seeds = torch.stack([torch.randint(2**62, (channels,), generator=g) for g in generators])
        height = t.to(x.device).repeat_interleave(channels)
        return self.field(x.shape[2:], height, seeds.flatten()).view(x.shape).to(x.dtype)

    def field(self, size: torch.Size | tuple[int, int], t: Tensor, seeds: Tensor) -> Tensor:
        """Fields (N, H, W) float32 on the device of t; t: (N,), heights; seeds: (N,) int64."""
        scale = 2.0 ** torch.arange(self.octaves, device=t.device, dtype=torch.float64) / self.frequency
        rows, columns = (torch.arange(n, device=t.device, dtype=torch.float64) for n in size)
        shape = (len(t), self.octaves, *size)  # all octaves of all fields at once
        points = [
            (scale[:, None, None] * columns).expand(shape),
            (scale[:, None, None] * rows[:, None]).expand(shape),
        ]
        if self.mode == "3d":
            points.append((scale[:, None, None] * t.double().view(-1, 1, 1, 1)).expand(shape))
        octaves = simplex(points, permutation(seeds).to(t.device))
        amplitude = self.persistence ** torch.arange(self.octaves, device=t.device, dtype=octaves.dtype)
        return (octaves * amplitude[:, None, None]).sum(dim=1)


def simplex(points: list[Tensor], perm: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """OpenSimplex noise at 2 or 3 coordinates, each (N, ...) float64, with one permutation per row, (N, 256).

    Sums attn^4 (g . d) over all lattice vertices with attn = 2 - |d|^2 > 0. In 2D that is the reference; in 3D the
    reference leaves out some far vertices, which is worth at most 1.2e-4. `dtype` of the sum; float32 errs by 4e-7.
    """
    dims, shape = len(points), points[0].shape
    stretch, squish = _skew(dims)
    skewed = sum(points[1:], points[0]) * stretch
    base = [(p + skewed).floor() for p in points]
    corner = sum(base[1:], base[0]) * squish
    inside = [(p - b - corner).to(dtype) for p, b in zip(points, base, strict=True)]
    # four copies of each permutation, so that an index, hash + cell + vertex in -2 ... 513, needs no remainder
    start = 1024 * torch.arange(len(perm), device=perm.device).view(-1, *[1] * (len(shape) - 1)) + 256
    cells = [((b.long() & 255) + start).int().flatten() for b in base]
    table = perm.repeat(1, 4).flatten()
    gradients = _gradients(dims).to(perm.device, dtype)[table].unbind(dim=1)
    table = table.int()
    indices: dict[tuple[int, ...], Tensor] = {(v,): cells[0] + v for v in range(-2, 4)}
    value = torch.zeros_like(inside[0]).flatten()
    for vertex in _vertices(dims):
        for axis in range(1, dims):  # vertices that share their first coordinates share their hashes
            if (known := vertex[: axis + 1]) not in indices:
                indices[known] = table.index_select(0, indices[known[:-1]]) + (cells[axis] + known[-1])
        shift = sum(vertex) * squish
        d = [i.flatten() - (v + shift) for i, v in zip(inside, vertex, strict=True)]
        attn, dot = torch.full_like(value, 2.0), torch.zeros_like(value)
        for component, gradient in zip(d, gradients, strict=True):
            attn.addcmul_(component, component, value=-1)
            dot.addcmul_(component, gradient.index_select(0, indices[vertex]))
        value.addcmul_(attn.clamp_(min=0).square_().square_(), dot)
    return value.view(shape) / NORM[dims]


def permutation(seeds: Tensor) -> Tensor:
    """The shuffled table 0 ... 255 of each seed by a 64-bit linear congruential generator, (N,) int64 -> (N, 256)."""
    state = seeds.cpu().numpy().astype(np.int64).view(np.uint64)  # wraps around, as in the reference
    source = np.tile(np.arange(256), (len(state), 1))
    perm = np.empty_like(source)
    rows = np.arange(len(state))
    for _ in range(3):
        state = state * LCG_FACTOR + LCG_STEP
    for i in range(255, -1, -1):
        state = state * LCG_FACTOR + LCG_STEP
        chosen = (state.view(np.int64) % (i + 1) + 31) % (i + 1)  # of signed numbers, and not negative
        perm[:, i] = source[rows, chosen]
        source[rows, chosen] = source[:, i]
    return torch.from_numpy(perm)


def _skew(dims: int) -> tuple[float, float]:
    """Stretch and squish constants of the lattice."""
    return (1 / (dims + 1) ** 0.5 - 1) / dims, ((dims + 1) ** 0.5 - 1) / dims


@cache
def _gradients(dims: int) -> Tensor:
    """The gradient of each hash, (256, dims) float64."""
    table = torch.tensor(GRADIENTS_2D if dims == 2 else GRADIENTS_3D, dtype=torch.float64)
    index = torch.arange(256)
    return table[(index & 0x0E) // 2 if dims == 2 else index % 24]


@cache
def _vertices(dims: int) -> list[tuple[int, ...]]:
    """Lattice vertices, from the base of a cell, that come closer than sqrt(2) to some point of the cell."""
    _, squish = _skew(dims)
    u = torch.cartesian_prod(*[torch.linspace(0, 1, 33, dtype=torch.float64)] * dims)  # the cell, in skewed coordinates

    def distance2(vertex: tuple[int, ...]) -> float:
        d = u - torch.tensor(vertex)
        return float((d + squish * d.sum(dim=1, keepdim=True)).square().sum(dim=1).min())

    return [vertex for vertex in product(range(-2, 4), repeat=dims) if distance2(vertex) < 2]
