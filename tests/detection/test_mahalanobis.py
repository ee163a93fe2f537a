"""The map of several reconstructions against the golden arrays (golden/mhd/README.md) and against a direct solution."""

import pytest
import torch
from arrays import golden

from common.detection.mahalanobis import contributions, mahalanobis_map


def given():
    """Slices (3, 1, 9, 8), ten reconstructions of each, and where they are looked at."""
    g = golden("mhd/mahalanobis")
    return g, g["x"][:, None], g["reconstructions"][:, :, None], g["mask"][:, None] > 0


def parts(image, reconstructions, foreground):
    """Differences (B, P) and deviations (B, N, P) in the foreground."""
    draws = reconstructions * foreground
    mean = draws.mean(dim=0)
    return (image * foreground - mean).flatten(1), (draws - mean).flatten(2).transpose(0, 1)


def test_map():
    g, *arrays = given()
    result = mahalanobis_map(*arrays, float(g["lambda_"]))
    torch.testing.assert_close(result[:, 0], g["distance"], atol=1e-6, rtol=0)


def test_map_in_single_precision_is_as_good():
    g, image, reconstructions, foreground = given()
    result = mahalanobis_map(image.float(), reconstructions.float(), foreground, float(g["lambda_"]))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[:, 0].double(), g["distance"], atol=1e-4, rtol=1e-3)


def test_what_pixels_add_and_its_sum():
    """Some take away: their root would be no number."""
    g, *arrays = given()
    added = contributions(*parts(*arrays), float(g["lambda_"]))
    torch.testing.assert_close(added.view_as(g["contribution"]), g["contribution"], atol=1e-6, rtol=0)
    torch.testing.assert_close(added.sum(dim=1), g["contribution_sum_per_slice"], atol=1e-6, rtol=1e-9)
    assert (added < -1e-3).any()
    assert (added.sum(dim=1) >= 0).all()


def test_full_covariance_is_another_map_than_the_diagonal():
    g, *arrays = given()
    result = mahalanobis_map(*arrays, float(g["lambda_"]))
    assert (result[:, 0] - g["VARIANT_diagonal"]).abs().max() > 0.1


@pytest.mark.parametrize("draws", [2, 5])
def test_is_the_direct_solution(draws):
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(2, 30, dtype=torch.float64, generator=generator)
    deviations = torch.randn(2, draws, 30, dtype=torch.float64, generator=generator)
    deviations = deviations - deviations.mean(dim=1, keepdim=True)
    covariance = deviations.transpose(1, 2) @ deviations / (draws - 1) + 0.01 * torch.eye(30, dtype=torch.float64)
    expected = difference * torch.linalg.solve(covariance, difference)
    torch.testing.assert_close(contributions(difference, deviations, 0.01), expected, rtol=1e-8, atol=1e-8)


def test_draws_that_are_all_alike_leave_the_error():
    """Over the root of the regularisation, 10 |d| for 0.01."""
    image = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    foreground = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    result = mahalanobis_map(image, (image * 0.9).expand(4, -1, -1, -1, -1), foreground, 0.01)
    torch.testing.assert_close(result, image, atol=1e-5, rtol=1e-5)


def test_what_the_draws_vary_counts_less():
    """The same error at two pixels, at one of which the reconstructions differ as much."""
    image = torch.zeros(1, 1, 1, 2)
    reconstructions = torch.full((8, 1, 1, 1, 2), 0.3)
    reconstructions[::2, ..., 0], reconstructions[1::2, ..., 0] = 0.0, 0.6
    result = mahalanobis_map(image, reconstructions, torch.ones(1, 1, 1, 2, dtype=torch.bool), 0.01)
    assert result[..., 0] < 0.5 * result[..., 1]


def test_outside_of_the_foreground_nothing_counts():
    _, image, reconstructions, foreground = given()
    other = torch.where(foreground, reconstructions, torch.rand_like(reconstructions))
    foreign = torch.where(foreground, image, torch.rand_like(image))
    result, expected = mahalanobis_map(foreign, other, foreground, 0.01), mahalanobis_map(*given()[1:], 0.01)
    torch.testing.assert_close(result, expected)
    assert not result[~foreground].any()


def test_channels_add_up():
    _, image, reconstructions, foreground = given()
    nothing = torch.zeros_like(image)
    twice = torch.cat([image, nothing], dim=1), torch.cat([reconstructions, nothing.expand_as(reconstructions)], dim=2)
    torch.testing.assert_close(
        mahalanobis_map(*twice, foreground, 0.01), mahalanobis_map(image, reconstructions, foreground, 0.01)
    )
