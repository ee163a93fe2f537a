"""What is around the tissue of an image: its grey value, where it was filled in, and what zero is.

Images differ: air may be 0, -1000, a mean that was taken away, or the noise of a spline around any of these.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

Box = tuple[slice, ...]

BINS = 1000
SAMPLE = 500_000  # voxels of which the commonest value is looked for
DEEP_VOXELS = 3  # from the rim, where splines overshoot
NEGATIVE_SHARE = 0.05  # of deep tissue: what is more is no overshoot, but a mean that was taken away
# the 1st percentile of a brain's voxels is 0.12 of the 98th (T1; IXI: standard deviation 0.02), counted from true zero
DARKEST_PERCENTILE, BRIGHT_PERCENTILE, DARKEST_SHARE = 1.0, 98.0, 0.12
NOT_ZERO = 0.01  # of the range of the tissue: a background below this is noise about 0
NEAR_ZERO = 0.5  # of the range of the tissue: a background as near as this to where zero is thought to be is that zero


def background(image: np.ndarray) -> np.ndarray:
    """(C, H, W, D) -> (C, 1, 1, 1): the commonest value, or the middle of the commonest ones where they are noise."""
    return np.stack([_background(channel) for channel in image]).reshape(-1, 1, 1, 1).astype(image.dtype)


def _background(channel: np.ndarray) -> np.float64:
    values = channel.ravel()[:: channel.size // SAMPLE | 1].astype(np.float64)  # bins of float32 end elsewhere
    counts, edges = np.histogram(values, BINS)
    densest = counts.argmax()
    there = values[(values >= edges[densest]) & (values <= edges[densest + 1])]
    value, times = np.unique(there, return_counts=True)
    return value[times.argmax()] if 2 * times.max() > len(there) else np.median(there)


def filled_in(image: np.ndarray, around: np.ndarray) -> np.ndarray:
    """(C, H, W, D) -> (H, W, D) bool: voxels of exactly the background in every channel, from the border inwards."""
    return joined_to_border((image == around).all(axis=0))


def joined_to_border(mask: np.ndarray) -> np.ndarray:
    """(H, W, D) bool -> bool: what hangs together, by the faces of voxels, with the border; the rest lies in holes."""
    labels, count = ndimage.label(mask)
    faces = [labels.take(side, axis) for axis in range(3) for side in (0, -1)]
    at_border = np.zeros(count + 1, dtype=bool)
    at_border[np.unique(np.concatenate([face.ravel() for face in faces]))] = True
    at_border[0] = False
    return at_border[labels]


def field_of_view(image: np.ndarray, around: np.ndarray) -> np.ndarray:
    """(C, H, W, D) -> (H, W, D) bool: the box outside of which every voxel is exactly the background."""
    seen = (image != around).any(axis=0)
    box = np.zeros(seen.shape, dtype=bool)
    box[box_of(seen)] = True
    return box


def box_of(inside: np.ndarray) -> Box:
    """The smallest box around what is inside, (H, W, D). Raises ValueError where nothing is."""
    if not inside.any():
        raise ValueError("the foreground is empty: there is no brain to compare")
    return tuple(
        slice(int(np.flatnonzero(line)[0]), int(np.flatnonzero(line)[-1]) + 1)
        for line in (inside.any(axis=axes) for axes in ((1, 2), (0, 2), (0, 1)))
    )


def is_negative(values: np.ndarray, mask: np.ndarray) -> bool:
    """Whether tissue, (H, W, D) where `mask` is true, is negative in more places than a spline makes it."""
    if not (values[mask] < 0).any():
        return False
    deep = ndimage.binary_erosion(mask, iterations=DEEP_VOXELS)
    return bool((values[deep if deep.any() else mask] < 0).mean() > NEGATIVE_SHARE)


def zero_of_tissue(image: np.ndarray, brain: np.ndarray, around: np.ndarray) -> np.ndarray:
    """(C,): the grey value at which there is no signal; 0, but where a mean was taken away.

    That is the background if it is negative and lies where the darkest tissue says; else what the darkest tissue says.
    """
    zeros = []
    for channel, grey in zip(image, around.ravel(), strict=True):
        low, high = np.percentile(channel[brain].astype(np.float64), [DARKEST_PERCENTILE, BRIGHT_PERCENTILE])
        guess = (low - DARKEST_SHARE * high) / (1 - DARKEST_SHARE)
        if -grey > NOT_ZERO * (high - low) and abs(guess - grey) < NEAR_ZERO * (high - low):
            zeros.append(float(grey))
        else:
            zeros.append(float(guess) if is_negative(channel, brain) else 0.0)
    return np.array(zeros, dtype=image.dtype)
