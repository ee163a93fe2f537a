import pytest
import torch
from arrays import slices
from monai.networks.nets import AutoEncoder
from torch import nn

from common.errors import ImageShapeError
from common.methods.ae import AE, AEObjective


class Shifted(nn.Module):
    """Reconstructs with a constant error."""

    strides = (2, 2)

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        return x + self.error


def tiny(channels=1, **settings):
    torch.manual_seed(0)
    network = AutoEncoder(2, channels, channels, (4, 8, 2), (2, 2, 1), kernel_size=5, up_kernel_size=5, norm=None)
    return AE(network, **settings).eval()


@pytest.mark.parametrize("channels", [1, 2])
def test_detection(check_detection, channels):
    check_detection(tiny(channels), slices(channels=channels))


def test_map_is_the_residual():
    image = torch.full((1, 1, 8, 8), 0.5)
    for error, residual, expected in [
        (-0.2, "absolute", 0.2),
        (0.2, "absolute", 0.2),
        (-0.2, "bright", 0.2),
        (0.2, "bright", 0.0),
        (0.9, "absolute", 0.5),  # a reconstruction is at most 1
    ]:
        detection = AE(Shifted(error), residual).detect(image)
        torch.testing.assert_close(detection.anomaly_map, torch.full_like(image, expected))


def test_median_removes_single_pixels_and_keeps_a_lesion():
    image = torch.full((1, 1, 16, 16), 0.2)
    image[..., 3, 3], image[..., 8:12, 8:12] = 0.9, 0.9
    detector = AE(Shifted(0.0), median_size=3)
    anomaly_map = detector.anomaly_map(image, torch.full_like(image, 0.2))
    assert anomaly_map[0, 0, 3, 3] == 0
    assert anomaly_map[0, 0, 9, 9].item() == pytest.approx(0.7)
    assert AE(Shifted(0.0), median_size=1).anomaly_map(image, torch.full_like(image, 0.2))[0, 0, 3, 3] > 0.6


def test_slice_gives_the_same_alone_and_in_any_batch(check_batches):
    check_batches(tiny(), slices())


def test_wrong_size_is_refused():
    with pytest.raises(ImageShapeError, match="multiples of 4"):
        tiny().detect(torch.rand(1, 1, 16, 18))


def test_loss():
    objective = AEObjective(AE(Shifted(-0.25)))
    assert objective(slices())["loss"].item() == pytest.approx(0.25)
    objective = AEObjective(tiny())
    objective(slices())["loss"].backward()
    assert all(p.grad is not None for p in objective.parameters())
