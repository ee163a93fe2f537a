"""BerDiff: masked Bernoulli diffusion for unsupervised anomaly detection (Wolleb et al., MICCAI 2024).

An autoencoder turns a slice into bits, and a diffusion model learns which bits of a noised healthy code were flipped.
At test time the code of the input is noised and sampled back. An entry that the model wants to flip is masked; all the
others are kept as the input has them. The decoded result is the pseudo-healthy slice. arXiv 2403.11667.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from monai.losses import PatchAdversarialLoss
from monai.networks.blocks.selfattention import SABlock
from monai.networks.nets import DiffusionModelUNet
from monai.networks.nets.diffusion_model_unet import zero_module
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from ..detection.method import AnomalyDetector, TrainingObjective, median
from ..diffusion.bernoulli import BernoulliScheduler
from ..errors import SettingError
from ..networks.latent_space import LatentSpace
from ..networks.pixel_unshuffle_unet import size_divisor
from .latent_objective import LatentObjective

MEDIAN_SIZE = 5
LOGIT_ERROR = 5e-5  # times 1 + |logit|: ten times as much as batches of other sizes were seen to change it by


def flip_unet(
    latent_channels: int = 128,
    channels: Sequence[int] = (128, 256, 256, 256),
    num_res_blocks: int = 2,
    attention_levels: Sequence[bool] = (False, True, False, False),
    norm_num_groups: int = 32,
) -> DiffusionModelUNet:
    """MONAI's U-Net as published: logits of a flip, (B, N, h, w); single heads whose outputs start at zero.

    The defaults are the paper's, 36,034,432 parameters; `norm_num_groups` must divide narrower `channels`.
    """
    unet = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_res_blocks=num_res_blocks,
        channels=channels,
        attention_levels=attention_levels,
        norm_num_groups=norm_num_groups,
        norm_eps=1e-5,
        num_head_channels=channels,
    )
    for module in unet.modules():
        if isinstance(module, SABlock):
            zero_module(module.out_proj)
    return unet


class BerDiff(AnomalyDetector):
    """The detector (Algorithm 1); the image-level score is the share of masked entries.

    Args:
        latent_space: of bits, `BinaryLatentSpace`.
        unet: logits of P(bit was flipped) from (z_t, t), such as `flip_unet`.
        L: noise steps, 1 to T; 200 in the paper.
        P: an entry is masked where its probability of a flip is above, in [0, 1); 0 masks all: the unmasked variant.
        num_inference_steps: function evaluations of the sampling from L; default: L, as published.
        num_passes: samples; their reconstructions and scores are averaged.
        combine: the map of several samples. "maps": mean of their squared differences. "reconstructions": squared
            difference to their mean. "mahalanobis": that over their variance, so that what no two samples draw alike
            counts less (Behrendt et al., 2024, pixel by pixel).
        regularisation: added to the variance in "mahalanobis".
        compared_with: what the reconstructions are compared with. "image", as published, or "decoded": D(p), the
            image as the autoencoder gives it back, so that its own error cancels.
        batch_size: slices that the encoder and the U-Net take at a time, by the memory of the device; see `decided`.

    The map is median filtered, 5 x 5, as in the paper's evaluation. Both the paper and its program need the scheduler's
    `soft_z0` "inserted". Where the scheduler's `reference` is "code", the code is noised once more than it is denoised,
    and what is decoded in the end is the last prediction itself: neither drawn nor masked.

    Raises SettingError where a number is out of its range.
    """

    networks = ("unet",)

    unrecorded = frozenset({"batch_size"})

    def __init__(
        self,
        latent_space: LatentSpace,
        unet: DiffusionModelUNet,
        scheduler: BernoulliScheduler,
        L: int = 200,
        P: float = 0.5,
        num_inference_steps: int | None = None,
        num_passes: int = 1,
        combine: Literal["maps", "reconstructions", "mahalanobis"] = "maps",
        regularisation: float = 0.01,
        compared_with: Literal["image", "decoded"] = "image",
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        if not 0 <= P < 1 or min(num_passes, batch_size) < 1 or regularisation <= 0:
            fact = f"P = {P}, num_passes = {num_passes}, batch_size = {batch_size}, regularisation = {regularisation}"
            raise SettingError("BerDiff", fact, "choose P in [0, 1), at least 1 of the next two, and the last above 0")
        self.noise_index_offset = 1 if scheduler.reference == "code" else 0
        last = scheduler.num_train_timesteps - self.noise_index_offset
        if not 1 <= L <= last:
            raise SettingError("BerDiff", f"L = {L} is outside the schedule", f"choose 1 to {last}")
        scheduler.set_timesteps(L if num_inference_steps is None else num_inference_steps, L)
        self.latent_space = latent_space
        self.unet = unet
        self.scheduler = scheduler
        self.P = P
        self.num_passes = num_passes
        self.combine = combine
        self.regularisation = regularisation
        self.compared_with = compared_with
        self.batch_size = batch_size
        self.size_divisor = latent_space.downsampling * size_divisor(unet)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, ...]:
        image = convert_to_tensor(image, track_meta=False)  # the meta data of a batch does not survive its splitting
        parts = [self.latent_space.posterior(part) for part in image.split(self.batch_size)]
        p, std = (torch.cat(part) for part in zip(*parts, strict=True))  # P(z = 1)
        full = len(p) - len(p) % self.batch_size  # slices in full batches
        error = LOGIT_ERROR * std + torch.finfo(p.dtype).eps
        error[:full] = 0
        passes = []
        for _ in range(self.num_passes):
            u = uniform_like(p, generators)
            if ((p - u).abs() < error).any():  # see `decided`
                rest = in_equal_batches(lambda x: self.latent_space.posterior(x)[0], self.batch_size, image[full:])
                p = torch.cat([p[:full], rest])
                error.zero_()
            passes.append(self.one_pass((p > u).to(image.dtype), generators))
        x_hat, score = (torch.stack(part) for part in zip(*passes, strict=True))
        seen = image
        if self.compared_with == "decoded":
            seen = torch.cat([self.latent_space.decode(part) for part in p.split(self.batch_size)]).clamp(0, 1)
        return median(self.anomaly_map(seen, x_hat), MEDIAN_SIZE), x_hat.mean(0), score.mean(0)

    def one_pass(self, z: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Of a drawn code z (B, N, h, w): reconstruction x_hat (B, C, H, W) and the share of masked entries (B,)."""
        code, mask = self.sample(z, generators)
        return self.latent_space.decode(code).clamp(0, 1), mask.flatten(1).float().mean(1)

    def anomaly_map(self, image: Tensor, x_hat: Tensor) -> Tensor:
        """Of one or more reconstructions (passes, B, C, H, W): (B, 1, H, W), the sum over channels."""
        if self.combine == "maps":
            return (image - x_hat).square().mean(0).sum(1, keepdim=True)
        distance = (image - x_hat.mean(0)).square()
        if self.combine == "mahalanobis":
            distance = distance / (x_hat.var(0, correction=0) + self.regularisation)
        return distance.sum(1, keepdim=True)

    def sample(self, z: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Noise z and sample: the code to decode, and the mask of what may differ from z, bool; all (B, N, h, w)."""
        steps = self.scheduler.timesteps
        start = torch.full((len(z),), steps[0] + self.noise_index_offset, device=z.device)
        z_t, mask = self.scheduler.add_noise(z, uniform_like(z, generators), start), torch.zeros_like(z).bool()
        for t, s in zip(steps, [*steps[1:], -1], strict=True):
            at_t = torch.full_like(start, t)
            if s < 0 and self.scheduler.reference == "code":
                logits = torch.cat([self.unet(*part) for part in _parts(self.batch_size, z_t, at_t)])
                return (z_t - logits.sigmoid()).abs(), mask
            u = uniform_like(z, generators)
            z_t, mask = decided(self.unet, self._step(t, s), self.batch_size, (z_t, at_t), (z, z_t, mask, u))
        return z_t, mask

    def _step(self, t: int, s: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """From t to s: of the network's logits, z, z_t, mask and u the next z_t and mask."""

        def step(logits: Tensor, z: Tensor, z_t: Tensor, mask: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            eps = logits.sigmoid()
            mask = mask | (eps > self.P) | (self.P == 0)  # a saturated eps is 0 in float32
            z0 = torch.where(mask, (z_t - eps).abs(), z)  # P(z0 = 1)
            return self.scheduler.step(z_t, z0, t, s, u), mask

        return step


def decided(
    network: Callable[..., Tensor],
    decide: Callable[..., tuple[Tensor, ...]],
    size: int,
    inputs: Sequence[Tensor],
    others: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """What `decide(network(*inputs), *others)` draws in batches of exactly `size`, of which zeros fill up the last one.

    Layers round differently in batches of other sizes. Elsewhere that is noise of 1e-6; here it flips a bit now and
    then, and from there another sample: one slice in ten would differ between a batch and alone. A batch that is
    smaller is therefore filled up, but only where a decision is so near that rounding could change it. Whether one is,
    is seen by deciding with all logits a little lower and a little higher, in which every decision is monotonous.

    network: gives logits (B, ...). inputs, others: (B, ...) each. decide: gives tensors (B, ...) of decisions.
    """
    results = []
    for given, rest in zip(_parts(size, *inputs), _parts(size, *others), strict=True):
        logits = network(*given)
        result = decide(logits, *rest)
        if len(logits) < size and not all(
            torch.equal(*pair)
            for error in (-LOGIT_ERROR, LOGIT_ERROR)
            for pair in zip(result, decide(logits + error * (1 + logits.abs()), *rest), strict=True)
        ):
            result = decide(in_equal_batches(network, size, *given), *rest)
        results.append(result)
    return tuple(torch.cat(part) for part in zip(*results, strict=True))


def in_equal_batches(network: Callable[..., Tensor], size: int, *inputs: Tensor) -> Tensor:
    """The network's output for inputs (B, ...), given to it in batches of exactly `size`, see `decided`."""
    outputs = []
    for parts in _parts(size, *inputs):
        n = len(parts[0])
        outputs.append(network(*(torch.cat([x, x.new_zeros(size - n, *x.shape[1:])]) for x in parts))[:n])
    return torch.cat(outputs)


def _parts(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def uniform_like(reference: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Uniform in [0, 1), float32, one generator per slice, drawn on the CPU so that every device sees the same."""
    u = torch.stack([torch.rand(reference.shape[1:], generator=g) for g in generators])
    return u.to(reference.device)


class BerDiffObjective(LatentObjective):
    """Cross entropy of the flips z_t XOR z0, the mean over all entries, in nats.

    Args:
        detector: the `BerDiff` whose U-Net is trained; its latent space stays frozen.
        max_t: training draws t from 0 .. max_t - 1; default: from all T steps, as published. Detection never asks for
            more than L of them.

    Raises SettingError where `max_t` is not in [1, T].
    """

    def __init__(self, detector: BerDiff, max_t: int | None = None) -> None:
        super().__init__()
        T = detector.scheduler.num_train_timesteps
        self.max_t = T if max_t is None else max_t
        if not 1 <= self.max_t <= T:
            raise SettingError("BerDiffObjective", f"max_t = {max_t} is outside the schedule", f"choose 1 to {T}")
        self.detector = detector

    def losses_of(self, mean: Tensor, std: Tensor, foreground: Tensor | None) -> dict[str, Tensor]:
        """Key `loss`; the mean is P(z = 1), from which bits are drawn anew at every call."""
        p = mean
        z0 = (torch.rand_like(p) < p).to(p.dtype)
        t = torch.randint(self.max_t, (len(z0),), device=z0.device)
        z_t = self.detector.scheduler.add_noise(z0, torch.rand_like(z0), t)
        return {"loss": self.flip_loss(z0, z_t, self.detector.unet(z_t, t))}

    def flip_loss(self, z0: Tensor, z_t: Tensor, logits: Tensor) -> Tensor:
        """Mean of -log P(flip or no flip), nats; the published code divides by ln 2. All (B, N, h, w)."""
        return F.binary_cross_entropy_with_logits(logits.float(), (z_t - z0).abs().float())


class BinaryAutoencoderObjective(TrainingObjective):
    """First stage: reconstruction from sampled bits, on images in [-1, 1].

    Args:
        latent_space: the `BinaryLatentSpace` whose autoencoder is trained here.
        reconstruction: "l1" in the code, "l2" in the paper; "both" is L1 + 2 L2, as the first stage of the KL methods.
        indecision_weight: of the mean of 4 p (1 - p) over all bits: 0 where each is decided, 1 where each is a coin.
            A bit that is no more than a coin tells the diffusion model nothing. Ours; 0, none, as published.
        perceptual: (reconstruction, target) -> loss, kept frozen, such as `monai.losses.PerceptualLoss`; the paper
            has one, the code none for BRATS.
        discriminator: adds an adversarial loss, with MONAI's `PatchDiscriminator`; the paper has one, the code none
            before step 30,001. It learns under the same optimizer: each player's gradient stops at the other. The
            weight of this term, 0.1, is ours: the paper gives none.
    """

    def __init__(
        self,
        latent_space: LatentSpace,
        reconstruction: Literal["l1", "l2", "both"] = "l1",
        indecision_weight: float = 0.0,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = latent_space.autoencoder.requires_grad_(True)
        self.reconstruction = reconstruction
        self.indecision_weight = indecision_weight
        self.perceptual = perceptual if perceptual is None else perceptual.requires_grad_(False)
        self.discriminator = discriminator
        self.patch_loss = PatchAdversarialLoss(criterion="hinge")

    def forward(self, images: Tensor, foreground: Tensor | None = None) -> dict[str, Tensor]:
        """Keys `loss`, `l1`, `l2`, `indecision`, and those in use of `perceptual`, `generator`, `discriminator`."""
        target = images * 2 - 1
        reconstruction, p, _ = self.autoencoder(target)
        difference = reconstruction - target
        losses = {
            "l1": difference.abs().mean(),
            "l2": difference.square().mean(),
            "indecision": (4 * p * (1 - p)).mean(),
        }
        terms = losses | {"both": losses["l1"] + 2 * losses["l2"]}
        losses["loss"] = terms[self.reconstruction] + self.indecision_weight * losses["indecision"]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(reconstruction, target)
            losses["loss"] = losses["loss"] + losses["perceptual"]
        if self.discriminator is not None:
            losses |= self._adversarial(self.discriminator, reconstruction, target)
            losses["loss"] = losses["loss"] + 0.1 * losses["generator"] + losses["discriminator"]
        return losses

    def _adversarial(self, discriminator: nn.Module, reconstruction: Tensor, target: Tensor) -> dict[str, Tensor]:
        frozen = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
        judged = torch.func.functional_call(discriminator, frozen, (reconstruction,))[-1]
        fake = self.patch_loss(discriminator(reconstruction.detach())[-1], False, for_discriminator=True)
        real = self.patch_loss(discriminator(target)[-1], True, for_discriminator=True)
        return {
            "generator": self.patch_loss(judged, True, for_discriminator=False),
            "discriminator": (fake + real) / 2,
        }
