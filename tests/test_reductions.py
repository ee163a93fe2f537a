"""What a result depends on has the same last bit with every version of NumPy and PyTorch, see `reductions`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from reductions import coarse_reductions

from common.cohorts.synthetic_lesions import InsertLesions
from common.detection.calibration import Calibration
from common.detection.normalisation import ATLAS_SUBJECTS, WithinSubjectNormalisation
from common.metrics.masked_bernoulli import map_metrics
from common.metrics.paper_slices import _ssim
from common.report.viewer import _window_top
from common.results.preview import choose_slices
from common.transforms import registration, strip
from common.transforms.brain import BrainMaskd
from common.transforms.head import HeadMRMaskd
from common.transforms.intensity import ScaleIntensityByForegroundd
from common.transforms.pipeline import BrainPreprocessing
from common.transforms.tissue import tissue_modes
from common.workflows.calibrate import threshold_interval, threshold_of


@pytest.fixture(scope="module")
def brain(phantom):
    """Image and brain, (1, H, W, D), at 4 mm."""
    shape, affine = phantom.grid((4.0, 4.0, 4.0))
    image, brain, _ = phantom.on_grid(shape, affine)
    return tuple(MetaTensor(torch.from_numpy(volume)[None], affine=affine) for volume in (image, brain))


def healthy_maps(brain):
    random = torch.Generator().manual_seed(0)
    return [torch.rand(brain.shape, generator=random) * brain for _ in range(ATLAS_SUBJECTS)]


def prepare(image, brain):
    """The whole way of a brain to the network, with all that is optional but registration."""
    steps = BrainPreprocessing(4.0, 98.0, 0.8, 32, bias_correction=True, tissue_modes=(0.3, 0.5, 0.7))
    steps({"image": image, "brain": brain})


def prepare_from_negative(image, brain):
    """A brain without a mask from which a mean was taken away."""
    BrainMaskd("image", "brain")({"image": image - 500 * brain})


def prepare_head(image, brain):
    HeadMRMaskd("image", "brain")({"image": MetaTensor(torch.cat([image, image + 1, image * 2]), affine=image.affine)})


def register_parts(image, brain):
    registration.upright(image)
    registration.upright_brain(image, brain)
    registration.centre_of(brain)
    strip._first_guess(registration.upright(image), 0.0)


def calibrate(image, brain):
    normalisation, calibration = WithinSubjectNormalisation(), Calibration()
    values = normalisation.fit([normalisation.healthy_map(x, brain.bool()) for x in healthy_maps(brain)])
    calibration.fit(threshold_of(values, 0.01), 0.01, torch.rand(10), None, threshold_interval(values, 0.01))
    calibration.describe(normalisation(image, brain.bool())[0], brain.bool(), 0.5)


def show(image, brain):
    volume, inside = image[0].numpy(), brain[0].numpy() > 0
    choose_slices(np.moveaxis(volume, 2, 0), np.moveaxis(inside, 2, 0))
    _window_top(volume, inside)


def measure(image, brain):
    slices = np.moveaxis(image.numpy(), 3, 0)[8:12]
    map_metrics(np.concatenate([slices] * 4, axis=1), slices[:, 0] > 450, "sum")
    _ssim(slices[0] / 1000, slices[1] / 1000)


def insert_lesions(image, brain):
    for kind in ("blobs", "texture", "deformation"):
        InsertLesions(kind=kind, radius_mm=(9.0, 12.0), count=(1, 1))(image, brain)


WAYS = (prepare, prepare_from_negative, prepare_head, register_parts, calibrate, show, measure, insert_lesions)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_reduction_in_float32(way, brain):
    with coarse_reductions() as found:
        way(*brain)
    assert found == set()


PLANTED = """
def total(x): return x.sum()
def mean_of_three(x): return x[:3].mean(0)
def mean_of_two(x): return x[:2].mean(0)
def median(x): return np.percentile(x, 50) if isinstance(x, np.ndarray) else torch.quantile(x, 0.5)
def exact(x): return x.sum(dtype=np.float64 if isinstance(x, np.ndarray) else torch.float64)
"""


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: MetaTensor(torch.from_numpy(x))])
def test_such_a_reduction_is_found(kind):
    module = {"__name__": "planted.module", "np": np, "torch": torch}
    exec(PLANTED, module)  # noqa: S102 - the lines above
    values = kind(np.ones(8, np.float32))
    with coarse_reductions("planted") as found:
        for name in ("total", "mean_of_three", "mean_of_two", "median", "exact"):
            module[name](values)
    assert {place.split()[0] for place in found} == {f"planted.module:{line}" for line in (2, 3, 5)}


def test_level_of_the_foreground_is_rounded_once(brain):
    """NumPy 2 interpolates between float32 values in float32, NumPy 1 in float64."""
    image, mask = brain
    scaled = ScaleIntensityByForegroundd("image", "brain", 98.0, 0.8)({"image": image, "brain": mask})["image"]
    level = np.percentile(image[mask].numpy().astype(np.float64), 98.0)
    assert scaled.meta["intensity_unit"] == [level / 0.8]


def test_order_of_voxels_does_not_matter(brain):
    """The mean of a field and the modes of tissues are the same for a brain that is stored the other way round."""
    image, mask = brain
    values = (image / image.max()).numpy()[mask.numpy()]
    assert tissue_modes(values).tobytes() == tissue_modes(values[::-1].copy()).tobytes()
    forward = registration.centre_of(mask)
    flipped = mask.flip(1)
    flipped.affine = mask.affine @ torch.tensor(
        [[-1.0, 0, 0, mask.shape[1] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64
    )
    np.testing.assert_allclose(registration.centre_of(flipped), forward, atol=1e-9)
