"""THOR: temporal harmonization for optimal restoration (Bercea et al., MICCAI 2024, arXiv 2403.08464).

Partial diffusion as in `ddpm`, which also changes what is healthy. So at some steps of sampling the predicted
healthy image is harmonised: where it agrees with the slice already, in intensity and perceptually, the slice itself
takes its place, and sampling goes on from there. The map is what disagreed at every step. It needs no training of its
own: it runs on the weights of `ddpm`, or with simplex noise on those of `ano_ddpm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler
from torch import Generator, Tensor, nn

from ..detection.method import foreground_of, median, smoothed, with_generators
from ..diffusion.simplex import SimplexNoise
from ..errors import BundleError, SettingError
from .auto_ddpm import exceeded_by
from .ddpm import DDPM, DDPMObjective, Noise, gaussian_noise

EPS = 1e-8  # guard of the division by the highest value
HIGHEST = 0.999  # of the published map
HEALTHY_SHARE = 0.001  # of the healthy foreground that may exceed the scale of a step


@dataclass
class Sampling:
    """A batch while it is sampled: the slices in [0, 1], their one forward noise, and x_t in the network's range."""

    image: Tensor
    noise: Tensor
    x_t: Tensor
    generators: list[Generator]


class THOR(DDPM):
    """The detector; as many function evaluations as sampling has steps.

    At a step t the predicted clean image x0 differs from the slice x by c_t = clip(G(S(x, x0)), 0, 1) * |x - x0|, where
    S is the perceptual map and G a Gaussian filter; a_t = c_t / s_t. Harmonising: m x0 + (1 - m) x is noised again,
    with the noise of the start, where m = (dilate(close(a_t)) + a_t) / 2, a_t being clipped at 1. The map is the
    harmonic mean of a_t over the steps that are collected: high where no step agrees with the slice.

    Args:
        unet, scheduler, level, num_inference_steps, settings: see `DDPM`; published: level 350 and every index, with
            simplex noise level 250.
        noise: of the forward and the reverse process, that which the network was trained on: "gaussian" for weights of
            `ddpm`, "simplex" for those of `ano_ddpm`.
        perceptual: S, map (B, 1, H, W) >= 0 of two images in [0, 1], see `auto_ddpm`; None for 1 everywhere.
        harmonise: indices to harmonise at; None: all that are sampled at but the first and last. Published: 300, 150,
            50.
        collect: indices whose a_t enter the map, besides those of `harmonise`; None: all that are sampled at.
            Published: the multiples of 50.
        window: side of the square window of closing and dilation, odd; published: 13 pixels of 1.82 mm.
        sigma_px: of the Gaussian filter, which runs over H and W only; published: 2.
        scale: "fixed": s_t is the value that 0.1 % of the foreground of healthy slices exceed, which `fit_threshold`
            finds, so that maps of slices compare and a healthy one stays low. "image", published: s_t is the maximum of
            each slice, so that every slice reaches 1, and the map is clipped at 0.999.
        renoise: index that the harmonised image is noised to: "next" is what the network sees next; "t" as published.
        max_timestep: the network was trained on the indices below.
    """

    threshold: Tensor

    def __init__(
        self,
        unet: DiffusionModelUNet,
        scheduler: DDPMScheduler | None = None,
        noise: Literal["gaussian", "simplex"] = "gaussian",
        perceptual: nn.Module | None = None,
        level: int = 350,
        harmonise: Sequence[int] | None = None,
        collect: Sequence[int] | None = None,
        window: int = 13,
        sigma_px: float = 2.0,
        scale: Literal["fixed", "image"] = "fixed",
        renoise: Literal["next", "t"] = "next",
        max_timestep: int = 1000,
        **settings: Any,
    ) -> None:
        kind: Noise = SimplexNoise() if noise == "simplex" else gaussian_noise
        super().__init__(unet, scheduler, level=level, **{"forward_noise": kind, "reverse_noise": kind, **settings})
        if self.start >= max_timestep:
            fact = f"index {self.start} is not trained, the network knows those below {max_timestep}"
            raise SettingError("level", fact, f"choose a level of at most {max_timestep - 1}")
        if window < 1 or window % 2 == 0 or sigma_px < 0:
            fact = f"window = {window}, sigma_px = {sigma_px}"
            raise SettingError("THOR", fact, "choose an odd window and a sigma of 0 or more")
        visited = [t for t, _ in self.steps]
        self.harmonise = frozenset(visited[1:-1] if harmonise is None else self._visited("harmonise", harmonise))
        collected = visited if collect is None else self._visited("collect", collect)
        self.collect = self.harmonise.union(collected)
        if not self.collect:
            raise SettingError(
                "collect", "no step is collected, so there is no map", "name an index that is sampled at"
            )
        self.perceptual = perceptual
        self.window = window
        self.sigma_px = sigma_px
        self.scale = scale
        self.renoise = renoise
        # s_t of each index: 1, the largest value of c_t, before any weights; 0 where weights have none
        self.register_buffer("threshold", torch.ones(self.scheduler.num_train_timesteps, dtype=torch.float64))

    def _visited(self, name: str, indices: Sequence[int]) -> Sequence[int]:
        visited = [t for t, _ in self.steps]
        if missing := sorted(set(indices) - set(visited)):
            fact = f"index {missing[-1]} is not among the {len(visited)} that are sampled at"
            few = len(visited) <= 20
            among = ", ".join(map(str, visited)) if few else f"{visited[0]} to {visited[-1]}"
            raise SettingError(name, fact, f"choose among {among}")
        return indices

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Weights of a method that has no s_t, such as `ddpm`, are read too; `fit_threshold` is due then."""
        state_dict.setdefault(f"{prefix}threshold", torch.zeros_like(self.threshold))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[Generator]) -> tuple[Tensor, ...]:
        state, maps = self.begin(image, generators), []
        for t, t_prev in self.steps:
            x0 = self.clean(state, t)
            scaled = self.scaled(self.disagreement(state, x0), t) if t in self.collect else None
            if scaled is not None:
                maps.append(scaled)
            self.advance(state, x0, scaled, t, t_prev)
        anomaly_map = harmonic_mean(torch.stack(maps))
        if self.scale == "image":
            anomaly_map = anomaly_map.clamp(max=HIGHEST)
        anomaly_map = median(anomaly_map, self.median_size)
        score = (anomaly_map * foreground).flatten(1).mean(dim=1)  # over the whole slice, as published
        return anomaly_map, self.to_image(state.x_t).clamp(0, 1), score

    @torch.no_grad()
    def fit_threshold(self, batches: Iterable[Tensor]) -> None:
        """Set s_t of every step that is collected, from the first on, as each depends on those before.

        batches: healthy slices (B, C, H, W); slice i has the seed i, so the result does not depend on the batches. They
        are held in memory. Call `eval()` first. With scale "image" there is nothing to set.
        """
        if self.scale == "image":
            return
        states = [self.begin(image, generators) for image, generators in with_generators(batches)]
        self.threshold.zero_()
        for t, t_prev in self.steps:
            x0 = [self.clean(state, t) for state in states]
            scaled: list[Tensor | None] = [None] * len(states)
            if t in self.collect:
                c = [self.disagreement(state, x) for state, x in zip(states, x0, strict=True)]
                healthy = torch.cat([d[foreground_of(state.image)].cpu() for state, d in zip(states, c, strict=True)])
                self.threshold[t] = max(exceeded_by(healthy, HEALTHY_SHARE), EPS)
                scaled = [self.scaled(d, t) for d in c]
            for state, x, a in zip(states, x0, scaled, strict=True):
                self.advance(state, x, a, t, t_prev)

    # --- sampling ---

    def begin(self, image: Tensor, generators: list[Generator]) -> Sampling:
        """Slices (B, C, H, W) in [0, 1], noised to the first index."""
        x = self.to_network(image)
        times = torch.full((len(x),), self.start, device=x.device)
        noise = self.forward_noise(x, times, generators)
        return Sampling(image, noise, self.add_noise(x, times, noise), generators)

    def clean(self, state: Sampling, t: int) -> Tensor:
        """The predicted clean image x0, (B, C, H, W) in the network's range; one call of the network."""
        times = torch.full((len(state.x_t),), t, device=state.x_t.device)
        return self.predict_x0(state.x_t, t, self.unet(state.x_t, times))

    def advance(self, state: Sampling, x0: Tensor, scaled: Tensor | None, t: int, t_prev: int) -> None:
        """x_t to x_{t_prev}: by the reverse step, or harmonised and noised again."""
        times = torch.full((len(x0),), t, device=x0.device)
        if scaled is not None and t in self.harmonise:
            x = self.to_network(self.harmonised(state.image, self.to_image(x0), self.mask(scaled)))
            target = t if self.renoise == "t" else t_prev
            state.x_t = x if t_prev < 0 else self.add_noise(x, torch.full_like(times, target), state.noise)
            return
        is_ddim = self.num_inference_steps is not None
        mean, std = self.ddim(x0, state.x_t, t, t_prev) if is_ddim else self.posterior(x0, state.x_t, t)
        is_last = t_prev < 0 or std == 0
        state.x_t = mean if is_last else mean + std * self.reverse_noise(state.x_t, times, state.generators)

    # --- where a step disagrees with the slice ---

    def disagreement(self, state: Sampling, x0: Tensor) -> Tensor:
        """c_t in [0, 1], (B, 1, H, W); x0 in the network's range."""
        predicted = self.to_image(x0).clamp(0, 1)
        difference = self.difference(state.image, predicted)
        if self.perceptual is None:
            return difference
        return smoothed(self.perceptual(state.image, predicted), self.sigma_px).clamp(0, 1) * difference

    def scaled(self, c: Tensor, t: int) -> Tensor:
        """a_t = c_t / s_t, (B, 1, H, W) >= 0; BundleError where no healthy slices have set s_t."""
        if self.scale == "image":
            return (c / (c.amax(dim=(1, 2, 3), keepdim=True) + EPS)).clamp(0, 1)
        if self.threshold[t] == 0:
            fact = f"not calibrated for THOR at index {t}"
            advice = "calibrate them with these settings on healthy subjects"
            raise BundleError("weights", fact, advice, items="scale=image")
        return c / self.threshold[t].to(c)

    def mask(self, scaled: Tensor) -> Tensor:
        """m in [0, 1], soft: how much of the slice is replaced; (B, 1, H, W) -> same."""
        a = scaled.clamp(0, 1)
        return ((self.dilated(self.closed(a)) + a) / 2).clamp(0, 1)

    def dilated(self, a: Tensor) -> Tensor:
        """The maximum over the window, (B, 1, H, W) -> same."""
        return F.max_pool2d(a, self.window, stride=1, padding=self.window // 2)

    def closed(self, a: Tensor) -> Tensor:
        """Dilated, then eroded (the minimum over the window), (B, 1, H, W) -> same."""
        return -self.dilated(-self.dilated(a))

    @staticmethod
    def harmonised(image: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        """The predicted image where the mask is 1 and the slice where it is 0, both and the result in [0, 1].

        Mixed before it is brought to the network's range: the reference clips the range [-1, 1] to [0, 1], which turns
        what is darker than mid-grey, the background too, into mid-grey.
        """
        return (mask * predicted + (1 - mask) * image).clamp(0, 1)


class THORObjective(DDPMObjective):
    """The loss of `DDPM`: the networks may be exchanged."""


def harmonic_mean(maps: Tensor) -> Tensor:
    """K / (1 / a_1 + ... + 1 / a_K) of (K, B, 1, H, W) >= 0, which is 0 where any of them is 0."""
    return len(maps) / (1 / maps).sum(dim=0)
