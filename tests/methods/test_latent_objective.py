"""The second stages of the latent methods see the same posterior of images as `LatentDataset` keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common.methods.latent_objective import LatentObjective


class Seen(LatentObjective):
    """Returns what it is given."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        space = SimpleNamespace(posterior=lambda images: (images * self.scale, images + self.scale))
        self.detector = SimpleNamespace(latent_space=space)

    def losses_of(self, mean, std, foreground):
        return {"mean": mean, "std": std, "foreground": foreground}


IMAGES = torch.tensor([0.0, 0.5]).reshape(1, 1, 1, 2)


def test_images_are_encoded_without_gradient_and_have_their_foreground():
    found = Seen()(IMAGES)
    assert torch.equal(found["mean"], 2 * IMAGES)
    assert torch.equal(found["std"], IMAGES + 2)
    assert not found["mean"].requires_grad
    assert found["foreground"].flatten().tolist() == [False, True]


def test_what_is_given_is_taken():
    foreground, posterior = torch.ones(1, 1, 1, 2, dtype=torch.bool), (IMAGES + 5, IMAGES + 7)
    assert Seen()(IMAGES, foreground)["foreground"] is foreground
    found = Seen()(foreground=foreground, posterior=posterior)
    assert (found["mean"], found["std"]) == posterior
    assert Seen()(posterior=posterior)["foreground"] is None
    with pytest.raises(ValueError, match="give images"):
        Seen()(foreground=foreground)
