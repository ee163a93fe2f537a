"""f-AnoGAN: a GAN of healthy slices and an encoder into it (Schlegl et al., Medical Image Analysis 54, 2019).

A generator learns to draw healthy slices, against a critic (WGAN-GP). Then both are frozen, and an encoder learns to
find the code whose drawing is most like a slice, in pixels and in the critic's features ("izi_f"). At test time one
pass through encoder and generator gives the pseudo-healthy slice.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from ..detection.method import AnomalyDetector, TrainingObjective
from ..errors import ImageShapeError, SettingError
from ..networks.residual_gan import Generator as SliceGenerator
from ..networks.residual_gan import ResidualEncoder
from ..recorded import Recorded


class WGAN(Recorded, nn.Module):
    """A generator and its critic, of the first stage; its images are in [-1, 1].

    Args:
        generator: from codes (B, N) with N its `code_size`.
        critic: one number for each image, higher for real ones; `critic.features` are compared by the encoder.
    """

    def __init__(self, generator: SliceGenerator, critic: ResidualEncoder) -> None:
        super().__init__()
        self.generator = generator
        self.critic = critic


class FAnoGAN(AnomalyDetector):
    """The map is |x - x_hat|, x_hat = G(E(x)); the score the loss of the encoder, with the critic's features.

    The score is a mean over the whole slice, as published: background that is drawn as background counts as perfect.

    Args:
        gan: trained before the encoder.
        encoder: the code of a slice before its activation, tanh.
        size: H and W of the slices.
        kappa: weight of the features in the score and in the encoder's loss.
        code_scale: the code is so many times the tanh; 1 as published, although the generator was trained on codes of
            the standard normal distribution, which a tanh cannot reach.
    """

    networks = ("encoder", "gan.generator")

    def __init__(
        self, gan: WGAN, encoder: ResidualEncoder, size: int = 64, kappa: float = 1.0, code_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.gan = gan
        self.encoder = encoder
        self.size = size
        self.kappa = kappa
        self.code_scale = code_scale
        self.size_divisor = size

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, ...]:
        if image.shape[2:] != (self.size, self.size):
            fact = f"slices of {image.shape[2]} x {image.shape[3]} pixels"
            raise ImageShapeError("image", fact, f"give {self.size} x {self.size}, as the bundle's preprocessing does")
        x = image * 2 - 1
        x_hat = self.reconstruct(x)
        error = (x - x_hat).abs().mean(dim=1, keepdim=True) / 2  # in units of [0, 1]
        return error, (x_hat + 1) / 2, self.losses(x, x_hat)

    def reconstruct(self, x: Tensor) -> Tensor:
        """G(E(x)), (B, C, H, W) in [-1, 1] -> same."""
        return self.gan.generator(self.code(self.encoder(x)))

    def code(self, encoded: Tensor) -> Tensor:
        """The code from the encoder's last layer, (B, N) -> same."""
        return self.code_scale * torch.tanh(encoded)

    def losses(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Mean squared error of pixels and kappa times that of the critic's features, (B,)."""
        features, features_hat = (self.gan.critic.features(value) for value in (x, x_hat))
        of_image = (x - x_hat).square().flatten(1).mean(dim=1)
        return of_image + self.kappa * (features - features_hat).square().mean(dim=1)


class WGANGPObjective(TrainingObjective):
    """First stage: the critic learns at every call, the generator at every `critic_steps`-th, each from fresh slices.

    Both in one loss: each player's gradient stops at the other. Of Adam with one setting for both that is the same as
    two optimizers, as it leaves alone what a step gave no gradient.

    Args:
        detector: the `FAnoGAN` whose `gan` is trained.
        critic_steps: 5 as published.
        penalty: weight of the gradient penalty, 10 as published.
    """

    calls: Tensor

    def __init__(self, detector: FAnoGAN, critic_steps: int = 5, penalty: float = 10.0) -> None:
        super().__init__()
        if critic_steps < 1:
            raise SettingError("critic_steps", f"{critic_steps} steps of the critic", "choose at least 1")
        self.detector = detector
        detector.gan.requires_grad_(True)
        detector.encoder.requires_grad_(False)
        self.critic_steps = critic_steps
        self.penalty = penalty
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, and to watch: `distance` (of Wasserstein, the critic's estimate), `penalty`, and `spread`, the
        standard deviation over the drawn slices, the mean over their pixels: near 0 all are alike.

        Codes are drawn from the global generator.
        """
        critic, real = self.detector.gan.critic, images * 2 - 1
        fake = self.draw(len(real)).detach()
        alpha = torch.rand(len(real), 1, 1, 1, device=real.device)
        distance = (critic(real) - critic(fake)).mean()
        penalty = gradient_penalty(critic, real + alpha * (fake - real))
        loss = self.penalty * penalty - distance
        if self.training:
            self.calls += 1
            if self.calls % self.critic_steps == 0:
                loss = loss + self.generator_loss(len(real))
        return {"loss": loss, "distance": distance, "penalty": penalty, "spread": fake.float().std(dim=0).mean()}

    def generator_loss(self, count: int) -> Tensor:
        """-D(G(z)), the mean over so many codes; the critic gets no gradient."""
        critic = self.detector.gan.critic
        frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}
        return -torch.func.functional_call(critic, frozen, (self.draw(count),)).mean()

    def draw(self, count: int) -> Tensor:
        """Slices (B, C, H, W) of the generator, in [-1, 1]."""
        generator = self.detector.gan.generator
        return generator(torch.randn(count, generator.code_size, device=next(generator.parameters()).device))


def gradient_penalty(critic: nn.Module, x: Tensor) -> Tensor:
    """Mean of (|grad D(x)| - 1)^2, the norm over all pixels of a sample; (B, C, H, W) -> ().

    In float32 also under autocast, and where gradients are off.
    """
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().float().requires_grad_(True)
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class IZIFObjective(TrainingObjective):
    """Second stage: the encoder minimises the score of healthy slices; the GAN is frozen and in evaluation mode.

    Args:
        detector: the `FAnoGAN` whose `gan` is trained.
    """

    def __init__(self, detector: FAnoGAN) -> None:
        super().__init__()
        self.detector = detector
        detector.gan.requires_grad_(False)
        detector.encoder.requires_grad_(True)
        self.train()

    def train(self, mode: bool = True) -> IZIFObjective:
        """As in PyTorch, but for the GAN, whose batch norm keeps its statistics."""
        super().train(mode)
        self.detector.gan.eval()
        return self

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Key `loss`; and `image`, its part of the pixels, which falls below that of a mean image or the encoder
        ignores what it sees."""
        x = images * 2 - 1
        x_hat = self.detector.reconstruct(x)
        return {"loss": self.detector.losses(x, x_hat).mean(), "image": (x - x_hat).square().mean()}
