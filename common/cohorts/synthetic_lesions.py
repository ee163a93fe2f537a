"""Synthetic lesions in real brains: for TESTS and for the labelled test split only, never for training.

Our methods learn from healthy images alone; one that had trained on these lesions would be scored on what it was shown.
All sizes are in mm and all contrasts relative to the brain they are put in: one setting serves every scanner and grid.

Kinds:
* `blobs`: hypo- and hyper-intense, noise-deformed ellipsoids with soft borders;
* `chronic_stroke`, `acute_stroke`, `atlas`: a real lesion mask from MNI152 space, filled as on T1 (see `mni_lesions`);
* `texture`: a ball of tissue replaced by tissue from elsewhere in the same brain (normal tissue in the wrong place);
* `deformation`: a ball whose inside bulges or shrinks (normal tissue of the wrong shape).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform, Transform
from monai.utils import convert_data_type, convert_to_dst_type
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy import ndimage

from .mni_lesions import BORDER_MM, FACTORS, StrPath, fill, list_atlases, match_moments, mni_weight
from .mni_lesions import KINDS as MNI_KINDS

Array = NDArray[Any]

# Fewest and most lesions, smallest and largest radius (mm). Blobs: 3.7 ml on average (0.5 to 9), so four of them are
# 1 % of an adult brain (1.4 l). Swapped texture is larger, as it must be told from normal tissue. A deformation fades
# out inside its ball: it needs a large one, and few of those fit into a brain.
COUNT = {"blobs": (3, 5), "texture": (2, 4), "deformation": (1, 2)} | dict.fromkeys(MNI_KINDS, (1, 1))
RADIUS_MM = {"blobs": (5.0, 13.0), "texture": (8.0, 14.0), "deformation": (14.0, 22.0)}

HYPO = (0.35, 0.65)  # on T1 0.65 takes white matter to grey matter, 0.35 to CSF
# Percentiles of the local mean intensity between which blobs are put: not into ventricles (dark on T1, bright on T2),
# where they would not show.
BLOB_PERCENTILES = (20, 95)
MIN_CHANGE = 0.1  # share of the 98th percentile by which a blob must change a voxel to be counted as lesion
IRREGULARITY = 0.15  # standard deviation of the logarithm of a blob's radius over directions
# Places tried for a `texture` or a `deformation`; the one that shows best is taken, since white matter swapped with or
# moved within white matter would be a label without a lesion. Masks tried until one lies in the tissue of a brain.
DRAWS = 10


class InsertLesions(Transform):
    """Put lesions of one kind into a brain, and say where they are.

    The lesion mask holds the voxels where a lesion has half its strength or more (`blobs`: and where it changed a
    channel by more than `MIN_CHANGE`; `deformation`: where tissue moved by `mask_mm` or more). The image is untouched
    outside the brain, and where the mask is farther away than `border_mm` and one voxel (`deformation`: outside its
    ball). Lesions of one volume do not overlap.

    Args:
        kind: `blobs`, `texture`, `deformation`, `chronic_stroke`, `acute_stroke` or `atlas`.
        seed: same seed, subject and image, same lesions. The global random state is neither used nor changed.
        count: fewest and most lesions per volume, by default `COUNT` of the kind; a mask has those that are in it.
        radius_mm: smallest and largest radius, by default `RADIUS_MM` of the kind.
        hypo: range of the factor by which a hypo-intense lesion multiplies tissue, by default `FACTORS` of the kind.
            One draw per blob or mask.
        hyper: range of the factor by which a hyper-intense lesion multiplies tissue, as far as `hyper_limit` allows.
        hyper_limit: highest intensity to which a hyper-intense lesion raises tissue, as a multiple of each channel's
            98th percentile in the brain. At 1 a T1 lesion is no brighter than white matter: no threshold finds it.
        hyper_share: probability that a blob is hyper-intense.
        border_mm: width over which a lesion fades in, half of it on each side of the mask's surface, by default
            `BORDER_MM` of the kind.
        displacement: range of the largest displacement in a `deformation`, as a share of its radius.
        mask_mm: displacement from which tissue counts as lesion; less than about a voxel cannot be seen.
        atlas_mask: NIfTI path of a lesion mask in MNI152 space, several (one is drawn), or an array (H, W, D).
        atlas_affine: (4, 4), of `atlas_mask` if that is an array.
        mni_to_subject: (4, 4), MNI to subject world coordinates (mm, RAS), by default `match_moments` of the brain.

    Raises:
        ValueError: on creation for settings that cannot work; in a call for a brain that is empty or has no room.
    """

    def __init__(
        self,
        kind: str = "blobs",
        seed: int = 0,
        *,
        count: tuple[int, int] | None = None,
        radius_mm: tuple[float, float] | None = None,
        hypo: tuple[float, float] | None = None,
        hyper: tuple[float, float] = (1.3, 1.6),
        hyper_limit: float = 1.0,
        hyper_share: float = 0.5,
        border_mm: float | None = None,
        displacement: tuple[float, float] = (0.25, 0.3),
        mask_mm: float = 1.0,
        atlas_mask: StrPath | Array | Sequence[StrPath] | None = None,
        atlas_affine: NdarrayOrTensor | None = None,
        mni_to_subject: NdarrayOrTensor | None = None,
    ) -> None:
        if kind not in COUNT:
            raise ValueError(f"Unknown kind of lesion {kind!r}: choose one of {', '.join(COUNT)}.")
        self.atlases = list_atlases(atlas_mask, atlas_affine)
        if kind in MNI_KINDS and not self.atlases:
            raise ValueError(f"Lesions of kind {kind!r} need `atlas_mask`, a lesion mask in MNI152 space.")
        if displacement[1] * np.pi >= 1:  # slope of `_deformation`'s profile
            raise ValueError(f"`displacement` must stay below 1 / pi, or tissue folds over; got {displacement}.")
        self.kind, self.seed = kind, seed
        self.count, self.radius_mm = count or COUNT[kind], radius_mm or RADIUS_MM.get(kind, (0.0, 0.0))
        self.hypo, self.hyper, self.hyper_share = hypo or FACTORS.get(kind, HYPO), hyper, hyper_share
        self.border_mm = BORDER_MM.get(kind, 2.0) if border_mm is None else border_mm
        self.hyper_limit = hyper_limit
        self.displacement, self.mask_mm, self.mni_to_subject = displacement, mask_mm, mni_to_subject

    def __call__(  # type: ignore[override]
        self,
        image: NdarrayOrTensor,
        brain: NdarrayOrTensor,
        affine: NdarrayOrTensor | None = None,
        subject: str = "",
    ) -> tuple[NdarrayOrTensor, NdarrayOrTensor]:
        """Return the image with lesions and the lesion mask.

        image: (C, H, W, D) in any units; all channels get the same lesions, placed by the first one.
        brain: (1, H, W, D), nonzero inside. affine: (4, 4), by default that of a MetaTensor, else 1 mm voxels.
        subject: chooses the lesions together with the seed.
        Returns (C, H, W, D) in the same units (integers become float32) and (1, H, W, D) uint8, types as `image`.
        """
        if affine is None:
            affine = image.affine if isinstance(image, MetaTensor) else np.eye(4)
        volume, inside = _array(image).copy(), _array(brain)[0] > 0
        if volume.ndim != 4 or volume.shape[1:] != inside.shape:
            shapes = f"{tuple(image.shape)} and {tuple(brain.shape)}"
            raise ValueError(f"Expected an image (C, H, W, D) and a brain mask (1, H, W, D), got {shapes}.")
        if not inside.any():
            raise ValueError("The brain mask is empty: lesions go inside the brain, so it must be nonzero there.")
        if not np.issubdtype(volume.dtype, np.floating):
            volume = volume.astype(np.float32)
        rng = RandomState([self.seed, crc32(subject.encode())])
        insert = self._insert_atlas if self.kind in MNI_KINDS else self._insert_balls
        mask = insert(volume, inside, _array(affine).astype(np.float64), rng)
        return _like(volume, image), _like(mask[None].astype(np.uint8), image)

    def _insert_atlas(self, volume: Array, brain: Array, affine: Array, rng: RandomState) -> Array:
        mni_to_subject = match_moments(brain, affine) if self.mni_to_subject is None else _array(self.mni_to_subject)
        for _ in range(DRAWS):
            atlas = self.atlases[rng.randint(len(self.atlases))]
            weight, mask = mni_weight(atlas, volume, brain, affine, mni_to_subject, self.kind, self.border_mm)
            if mask.any():
                fill(volume, weight, brain, affine, self.kind, rng.uniform(*self.hypo), rng)
                return mask
        raise ValueError("The atlas lesions miss this brain: check `mni_to_subject` and the affines.")

    def _insert_balls(self, volume: Array, brain: Array, affine: Array, rng: RandomState) -> Array:
        """Insert `blobs`, `texture` or `deformation`, one lesion after the other."""
        mask = np.zeros_like(brain)
        box = ndimage.find_objects(brain.astype(np.uint8))[0]  # distance maps cost time: only around the brain
        site = _Site(volume[(slice(None), *box)], brain[box].copy(), mask[box], affine_to_spacing(affine))
        insert = {"blobs": self._blob, "texture": self._texture, "deformation": self._deformation}[self.kind]
        for _ in range(rng.randint(self.count[0], self.count[1] + 1)):
            insert(site, rng.uniform(*self.radius_mm), rng)
        return mask

    def _blob(self, site: _Site, radius_mm: float, rng: RandomState) -> None:
        low, high = np.percentile(site.local[site.free].astype(np.float64), BLOB_PERCENTILES)
        hyper = rng.uniform() < self.hyper_share
        room = self.hyper_limit * site.bright  # hyper-intense lesions go where there is room below the limit
        top = min(high, room.flat[0] / self.hyper[0]) if hyper else high
        centre = site.draw(site.depth_mm() * ((site.local >= low) & (site.local <= top)), radius_mm, rng)
        box, offset = site.around(centre, 2 * radius_mm + self.border_mm)
        weight = _fade(_irregular_depth(offset, radius_mm, rng), self.border_mm) * site.free[box]
        tissue = site.volume[(slice(None), *box)]
        if hyper:
            change = weight * np.clip((rng.uniform(*self.hyper) - 1) * tissue, 0, np.maximum(room - tissue, 0))
        else:
            change = weight * (rng.uniform(*self.hypo) - 1) * tissue
        # What was bright before is not a lesion. `>`: nor is anything in a channel of zeros.
        lesion = (weight >= 0.5) & (np.abs(change) > MIN_CHANGE * site.bright).any(axis=0)
        if not lesion.any():
            raise ValueError("A lesion would not show: move `hypo` or `hyper` away from 1, or raise `hyper_limit`.")
        away_mm = ndimage.distance_transform_edt(~lesion, sampling=site.spacing)  # no faint change far from the label
        near = away_mm <= self.border_mm + np.linalg.norm(site.spacing)
        site.write(box, tissue + change, touched=(weight > 0) & near, lesion=lesion)

    def _texture(self, site: _Site, radius_mm: float, rng: RandomState) -> None:
        reach = radius_mm + self.border_mm / 2
        depth = site.depth_mm()
        centre = site.draw(depth, reach, rng)
        apart = np.linalg.norm(_offset_mm(np.indices(depth.shape), centre, site.spacing), axis=0) >= 2 * reach
        sources = [site.draw(depth * apart, reach, rng) for _ in range(DRAWS)]
        source = max(sources, key=lambda voxel: abs(site.local[tuple(voxel)] - site.local[tuple(centre)]))
        box, offset = site.around(centre, reach)
        source_box, _ = site.around(source, reach)  # the same size: both balls lie inside the brain
        weight = _fade(radius_mm - np.linalg.norm(offset, axis=0), self.border_mm)
        tissue, other = site.volume[(slice(None), *box)], site.volume[(slice(None), *source_box)]
        site.write(box, tissue + weight * (other - tissue), touched=weight > 0, lesion=weight >= 0.5)

    def _deformation(self, site: _Site, radius_mm: float, rng: RandomState) -> None:
        """Move tissue along the radius by u(r) = +-a sin^2(pi r / R): smooth, and 0 at the centre and the surface."""
        depth = site.depth_mm()
        centres = [site.draw(depth, radius_mm, rng) for _ in range(DRAWS)]
        centre = max(centres, key=lambda voxel: site.volume[0][site.around(voxel, radius_mm)[0]].std(dtype=np.float64))
        box, offset = site.around(centre, radius_mm)
        distance = np.linalg.norm(offset, axis=0)
        amplitude = rng.choice([-1, 1]) * rng.uniform(*self.displacement) * radius_mm
        moved = np.where(distance < radius_mm, amplitude * np.sin(np.pi * distance / radius_mm) ** 2, 0)
        origin = offset * (1 - moved / np.maximum(distance, 1e-6))
        voxels = centre[:, None, None, None] + origin / site.spacing[:, None, None, None]
        values = np.stack([ndimage.map_coordinates(channel, voxels, order=1) for channel in site.volume])
        site.write(box, values, touched=moved != 0, lesion=np.abs(moved) >= self.mask_mm)


class InsertLesionsd(MapTransform):
    """Dictionary version of `InsertLesions`: replaces the image and adds the lesion mask.

    Args:
        keys: one image; modalities of one subject are its channels, so that all get the same lesions.
        brain_key: brain mask (1, H, W, D); None for a skull-stripped image, whose nonzero voxels are the brain.
        lesion_key: where the lesion mask goes.
        subject_key: item that names the subject, so that each one gets lesions of its own, in whatever order; None uses
            the seed alone.
        settings: as for `InsertLesions`.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        brain_key: str | None = "brain",
        lesion_key: str = "lesion",
        subject_key: str | None = None,
        allow_missing_keys: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise ValueError(f"InsertLesionsd takes one image, got {self.keys}: stack modalities as its channels.")
        self.brain_key, self.lesion_key, self.subject_key = brain_key, lesion_key, subject_key
        self.insert = InsertLesions(**settings)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of `data` with lesions in the image and the mask at `lesion_key`."""
        d = dict(data)
        for key in self.key_iterator(d):
            brain = d[key][:1] != 0 if self.brain_key is None else d[self.brain_key]
            subject = "" if self.subject_key is None else str(d[self.subject_key])
            d[key], d[self.lesion_key] = self.insert(d[key], brain, subject=subject)
        return d


@dataclass
class _Site:
    """A brain while lesions are put into it."""

    volume: Array  # (C, H, W, D), changed in place
    free: Array  # (H, W, D) bool: brain that no lesion has touched yet
    lesion: Array  # (H, W, D) bool, changed in place
    spacing: Array  # (3,) mm

    def __post_init__(self) -> None:
        self.bright = np.percentile(self.volume[:, self.free].astype(np.float64), 98, axis=1)[:, None, None, None]
        sigma = 4 / self.spacing  # 4 mm: over a gyrus, within a ventricle
        inside = self.free.astype(np.float32)
        share = ndimage.gaussian_filter(inside, sigma)
        self.local = ndimage.gaussian_filter(self.volume[0] * inside, sigma) / np.maximum(share, 1e-6)

    def depth_mm(self) -> Array:
        """Distance of every voxel to the nearest one that is not free."""
        return ndimage.distance_transform_edt(np.pad(self.free, 1), sampling=self.spacing)[1:-1, 1:-1, 1:-1]

    def draw(self, depth: Array, radius_mm: float, rng: RandomState) -> Array:
        """Draw a voxel around which a ball of this radius fits: (3,)."""
        places = np.argwhere(depth >= radius_mm)
        if not len(places):
            advice = "lower `radius_mm` or `count` (bright blobs: or raise `hyper_limit`)"
            raise ValueError(f"No room for a lesion of {radius_mm:.1f} mm radius: {advice}.")
        return places[rng.randint(len(places))]

    def around(self, centre: Array, reach_mm: float) -> tuple[tuple[slice, ...], Array]:
        """Return the box around a ball, cut at the volume's edge, and its offsets from the centre: (3, h, w, d) mm."""
        half = np.floor(reach_mm / self.spacing).astype(int)
        start, stop = np.maximum(centre - half, 0), np.minimum(centre + half + 1, self.free.shape)
        voxels = np.indices(stop - start) + start[:, None, None, None]
        return tuple(map(slice, start, stop)), _offset_mm(voxels, centre, self.spacing)

    def write(self, box: tuple[slice, ...], values: Array, touched: Array, lesion: Array) -> None:
        """Put values (C, h, w, d) where touched (h, w, d), and nowhere else."""
        self.volume[(slice(None), *box)] = np.where(touched, values, self.volume[(slice(None), *box)])
        self.free[box] &= ~touched
        self.lesion[box] |= lesion


def _offset_mm(voxels: Array, centre: Array, spacing: Array) -> Array:
    return (voxels - centre[:, None, None, None]) * spacing[:, None, None, None]


def _fade(depth_mm: Array, border_mm: float) -> Array:
    """Turn the depth below a surface into a weight from 0 to 1, 0.5 on the surface."""
    return np.clip(0.5 + depth_mm / max(border_mm, 1e-6), 0, 1)


def _irregular_depth(offset: Array, radius_mm: float, rng: RandomState) -> Array:
    """Depth (mm) below the surface of an ellipsoid, randomly turned and deformed by smooth noise over directions.

    The noise is a sum of plane waves on the unit sphere, so that the shape does not depend on the grid.
    """
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    axes = np.exp(rng.uniform(-0.3, 0.3, size=3))
    axes /= np.cbrt(axes.prod())  # the volume stays that of the ball
    point = np.einsum("ij,j...->i...", turn / axes[:, None], offset)
    distance = np.linalg.norm(point, axis=0)
    waves, phases = rng.normal(scale=2.5, size=(12, 3)), rng.uniform(0, 2 * np.pi, size=12)
    angles = np.einsum("ij,j...->i...", waves, point / np.maximum(distance, 1e-6)) + phases[:, None, None, None]
    noise = np.cos(angles).sum(axis=0) * np.sqrt(2 / len(waves))  # standard deviation 1
    return radius_mm * np.exp(IRREGULARITY * noise) - distance


def _array(data: NdarrayOrTensor) -> Array:
    return convert_data_type(data, np.ndarray)[0]


def _like(array: Array, image: NdarrayOrTensor) -> NdarrayOrTensor:
    return convert_to_dst_type(array, image, dtype=array.dtype)[0]
