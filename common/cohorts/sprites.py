"""Sprites on slices: the synthetic anomalies of Pinaya et al. (MICCAI 2022, arXiv 2206.03461, Table 1).

The paper contaminates head CT of 64 x 64 pixels with sprites; its appendix, which would say how, is not public. Here
the shapes, their 6 sizes and 40 orientations are those of dSprites (Matthey et al., 2017), drawn by formula and binary
as there: a pixel is in or out, without anti-aliasing. Place and grey value are uniform. For TESTS and labelled test
splits only, never for training.
"""

from __future__ import annotations

from typing import Any, Literal
from zlib import crc32

import numpy as np
from monai.config import NdarrayOrTensor
from monai.transforms import Transform
from monai.utils import convert_data_type, convert_to_dst_type
from numpy.random import RandomState
from numpy.typing import NDArray

SHAPES = ("square", "ellipse", "heart")
SCALES = np.linspace(0.5, 1, 6)
ORIENTATIONS = np.linspace(0, 2 * np.pi, 40, endpoint=False)
TRIES = 1000


def sprite(shape: str, size: tuple[int, int], centre: tuple[float, float], radius_px: float, angle: float) -> Any:
    """The pixels whose centres lie in a shape, (H, W) bool.

    The areas are about alike: a square with sides of 1.6 radii, an ellipse with half axes of 1 and 0.7 radii, the heart
    (x^2 + y^2 - 1)^3 = x^2 y^3.

    Args:
        centre: row and column; pixel centres are integers.
        angle: in radians, from rows to columns.
    Raises ValueError for another shape.
    """
    rows, columns = np.indices(size)
    y, x = (rows - centre[0]) / radius_px, (columns - centre[1]) / radius_px
    u, v = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.8
    if shape == "ellipse":
        return u**2 + (v / 0.7) ** 2 <= 1
    if shape == "heart":
        a, b = 1.2 * u, 0.1 - 1.2 * v  # so that it fills its circle, tip downwards
        return (a**2 + b**2 - 1) ** 3 <= a**2 * b**3
    raise ValueError(f"Unknown shape {shape!r}: choose one of {', '.join(SHAPES)}.")


class DrawSprite(Transform):
    """Draw one sprite of a random shape, size, orientation, place and grey value into a slice, and say where.

    A sprite that would not show, because its grey value is about that of what it covers, is drawn again.

    Args:
        seed: same seed, subject and image, same sprite. The global random state is neither used nor changed.
        onto: "anywhere": within the slice, so also in air; "tissue": within the foreground.
        radius_px: of the largest; dSprites has sizes from half of that.
        grey: lowest and highest grey value.
        min_change: mean absolute difference to the pixels covered, at least; a tenth of the grey values.
    """

    def __init__(
        self,
        seed: int = 0,
        onto: Literal["anywhere", "tissue"] = "anywhere",
        radius_px: float = 8.0,
        grey: tuple[float, float] = (0.0, 255.0),
        min_change: float = 25.5,
    ) -> None:
        if onto not in ("anywhere", "tissue"):
            raise ValueError(f"`onto` is 'anywhere' or 'tissue', not {onto!r}.")
        self.seed = seed
        self.onto = onto
        self.radius_px = radius_px
        self.grey = grey
        self.min_change = min_change

    def __call__(  # type: ignore[override]
        self, image: NdarrayOrTensor, foreground: NdarrayOrTensor | None = None, subject: str = ""
    ) -> tuple[NdarrayOrTensor, NdarrayOrTensor]:
        """Return the slice with a sprite, (1, H, W) of the type given, and the sprite, (1, H, W) uint8.

        image: (1, H, W), grey values. foreground: (1, H, W) bool, for "tissue". subject: chooses the sprite, with the
        seed. Raises ValueError where no sprite fits or would show.
        """
        values, tissue = _array(image), None
        if self.onto == "tissue":
            if foreground is None or foreground.shape != image.shape:
                raise ValueError("A sprite onto tissue needs the foreground, of the shape of the image.")
            tissue = _array(foreground)[0] > 0
        random = RandomState([self.seed, crc32(subject.encode())])
        mask, grey = self._draw(values[0].astype(np.float64), tissue, random)
        drawn = np.where(mask, np.asarray(grey, dtype=values.dtype), values)
        return convert_to_dst_type(drawn, image)[0], convert_to_dst_type(mask[None], image, dtype=np.uint8)[0]

    def _draw(
        self, image: NDArray[np.float64], tissue: NDArray[np.bool_] | None, random: RandomState
    ) -> tuple[NDArray[np.bool_], int]:
        """A sprite (H, W) and its grey value."""
        height, width = image.shape
        for _ in range(TRIES):
            shape, radius = SHAPES[random.randint(len(SHAPES))], self.radius_px * random.choice(SCALES)
            angle, grey = random.choice(ORIENTATIONS), round(random.uniform(*self.grey))
            corner = 1.2 * radius  # how far a shape reaches at most
            centre = random.uniform(corner, height - 1 - corner), random.uniform(corner, width - 1 - corner)
            mask = sprite(shape, (height, width), centre, radius, angle)
            fits = min(height, width) > 2 * corner and (tissue is None or tissue[mask].all())
            if fits and abs(image[mask] - grey).mean() >= self.min_change:
                return mask, grey
        raise ValueError(f"No sprite of up to {self.radius_px:g} pixels fits or shows: lower `radius_px`.")


def _array(data: NdarrayOrTensor) -> NDArray[Any]:
    return convert_data_type(data, np.ndarray)[0]
