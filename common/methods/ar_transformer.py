"""Autoregressive transformers over VQ-VAE codes (Pinaya et al., MIDL 2021, arXiv 2102.11650; MedIA 2022).

The comparator of the latent DDPM's paper. A code that is unlikely given those before it is replaced by a likely one,
and the residual of the healed image counts there. Several transformers, each with its own order of the codes, see an
anomaly from several sides: the ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.utils.ordering import Ordering
from torch import Tensor, nn

from ..detection.method import AnomalyDetector
from ..errors import ImageShapeError, SettingError
from ..networks.cached_transformer import TokenReader, lean_transformer
from ..networks.latent_space import LatentSpace
from .latent_ddpm import masked_residual
from .latent_objective import LatentObjective

# raster scans: identity or transposed, then rows and columns flipped or not
ORDERINGS = list(product((False, True), repeat=3))


@lru_cache
def sequence_order(size: tuple[int, int], index: int) -> Tensor:
    """The cells in the order of one of the eight `ORDERINGS`: (h w,) indices into the flattened map."""
    transpose, flip_rows, flip_columns = ORDERINGS[index]
    ordering = Ordering(
        "raster_scan",
        spatial_dims=2,
        dimensions=(1, *size),
        reflected_spatial_dims=(flip_rows, flip_columns),
        transpositions_axes=((1, 0),) if transpose else None,
    )
    return torch.from_numpy(ordering.get_sequence_ordering())


class ARTransformer(AnomalyDetector):
    """The detector; one transformer for each ordering, their maps averaged, and so the score: -sum log p of the codes.

    Each transformer is trained by itself, so weights of more orderings load as well: those of the first are taken.

    Args:
        latent_space: of a `VQAutoencoder`.
        latent_size: h and w, the longest sequence being h w.
        num_orderings: 1 to 8, see `ORDERINGS`; 8 is the paper's ensemble.
        dim, depth, heads: of each transformer; 128, 16, 16 in MONAI's tutorial.
        threshold: a code is unlikely below this probability. MONAI's tutorial takes the 3 % of an image's codes that
            are least likely, which flags healthy images alike.
        mode: what replaces an unlikely code: "sample", as the paper says, or the "argmax" of MONAI's tutorial.
        map_kind: "residual" (paper): |x - x'| within the mask of the unlikely codes. "surprisal": -log p of each code,
            upsampled, which needs no healing; so the reconstruction is what the first ordering heals.
        sigma_px: smoothing of the upsampled mask, as in `LatentDDPM`.

    Raises SettingError where `num_orderings` is not 1 to 8.
    """

    latent_space: Any  # its autoencoder is a `VQAutoencoder`

    def __init__(
        self,
        latent_space: LatentSpace,
        latent_size: Sequence[int],
        num_orderings: int = 8,
        dim: int = 128,
        depth: int = 16,
        heads: int = 16,
        threshold: float = 0.005,
        mode: Literal["argmax", "sample"] = "argmax",
        map_kind: Literal["residual", "surprisal"] = "residual",
        sigma_px: float = 2.0,
    ) -> None:
        super().__init__()
        if not 1 <= num_orderings <= len(ORDERINGS):
            fact = f"num_orderings = {num_orderings}"
            raise SettingError("ARTransformer", fact, f"choose 1 to {len(ORDERINGS)}")
        self.latent_space = latent_space
        self.begin = latent_space.autoencoder.num_embeddings  # the token before the first
        self.num_positions = latent_size[0] * latent_size[1]
        self.transformers = nn.ModuleList(
            lean_transformer(self.begin + 1, self.num_positions, dim, depth, heads) for _ in ORDERINGS[:num_orderings]
        )
        self.threshold = threshold
        self.mode = mode
        self.map_kind = map_kind
        self.sigma_px = sigma_px
        self.size_divisor = latent_space.downsampling
        self.register_load_state_dict_pre_hook(_leave_out_other_orderings)

    def _detect(self, image: Tensor, foreground: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, ...]:
        codes = self.codes(self.latent_space.posterior(image)[0])
        maps: list[Tensor] = []
        reconstructions: list[Tensor] = []
        scores: list[Tensor] = []
        for index in range(len(self.transformers)):
            sequence, order = self.sequence(codes, index)
            log_likelihood = self.log_likelihood(sequence, index)
            scores.append(-log_likelihood.sum(dim=1))
            if self.map_kind == "residual" or index == 0:
                unlikely = self.unlikely(log_likelihood)
                healed = self.heal(sequence, unlikely, self.reader(index), generators)
                reconstructions.append(self.decode(unflatten(healed, order, codes.shape)))
            if self.map_kind == "residual":
                mask = unflatten(unlikely, order, codes.shape)[:, None].to(image.dtype)
                maps.append(masked_residual(image, reconstructions[-1], mask, self.sigma_px))
            else:
                surprisal = unflatten(-log_likelihood, order, codes.shape)[:, None]
                maps.append(F.interpolate(surprisal, image.shape[2:], mode="bilinear"))
        return tuple(torch.stack(parts).mean(dim=0) for parts in (maps, reconstructions, scores))

    def codes(self, z: Tensor) -> Tensor:
        """Code indices of scaled latents (B, C_z, h, w): (B, h, w). Raises ImageShapeError where they are too many."""
        if z.shape[2] * z.shape[3] > self.num_positions:
            f = self.latent_space.downsampling
            fact = f"slices of {z.shape[2] * f} x {z.shape[3] * f} pixels have more than {self.num_positions} codes"
            raise ImageShapeError("image", fact, "crop or resample them to the size of the training slices")
        return self.latent_space.autoencoder.nearest_codes(z / self.latent_space.scale)

    def decode(self, codes: Tensor) -> Tensor:
        """Code indices (B, h, w) to image (B, C, H, W), about [0, 1]."""
        return self.latent_space.decode(self.latent_space.autoencoder.embed(codes) * self.latent_space.scale)

    def sequence(self, codes: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Codes (B, h, w) in one of the orderings, (B, h w), and the order."""
        order = sequence_order((codes.shape[1], codes.shape[2]), index).to(codes.device)
        return codes.flatten(1)[:, order], order

    def reader(self, index: int) -> TokenReader:
        """A reader at the beginning of its sequences."""
        return TokenReader(self.transformers[index])  # type: ignore[arg-type]

    def logits(self, sequence: Tensor, index: int) -> Tensor:
        """Of each token given those before it: (B, L) -> (B, L, K + 1)."""
        return self.transformers[index](F.pad(sequence[:, :-1], (1, 0), value=self.begin))

    def log_likelihood(self, sequence: Tensor, index: int) -> Tensor:
        """log p(x_i | x_<i) of each token: (B, L) -> (B, L)."""
        log_p = self.logits(sequence, index).log_softmax(dim=-1)
        return log_p.gather(2, sequence[..., None])[..., 0]

    def unlikely(self, log_likelihood: Tensor) -> Tensor:
        """Which tokens are healed: (B, L) -> (B, L) bool."""
        return log_likelihood.exp() < self.threshold

    def heal(
        self, sequence: Tensor, unlikely: Tensor, reader: TokenReader, generators: list[torch.Generator]
    ) -> Tensor:
        """Replace unlikely tokens one after the other, given the healed ones before: (B, L) -> (B, L)."""
        begin = torch.full_like(sequence[:, :1], self.begin)
        tokens = torch.cat([begin, sequence], dim=1)
        done = 0
        for position in unlikely.any(dim=0).nonzero().flatten().tolist():
            logits = reader.read(tokens[:, done : position + 1])[:, -1, : self.begin]  # never the begin token
            done = position + 1
            chosen = logits.argmax(dim=-1) if self.mode == "argmax" else None
            for i in unlikely[:, position].nonzero().flatten().tolist():
                tokens[i, done] = draw(logits[i], generators[i]) if chosen is None else chosen[i]
        return tokens[:, 1:]


def _leave_out_other_orderings(module: ARTransformer, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    own = tuple(f"{prefix}transformers.{index}." for index in range(len(module.transformers)))
    for name in [name for name in state_dict if name.startswith(f"{prefix}transformers.") and not name.startswith(own)]:
        del state_dict[name]


def unflatten(sequence: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `ARTransformer.sequence`: (B, h w) -> (B, h, w)."""
    return sequence[:, order.argsort()].view(shape)


def draw(logits: Tensor, generator: torch.Generator) -> int:
    """A token by its probability, from the slice's own generator; (V,) -> index."""
    cumulative = logits.double().softmax(dim=0).cumsum(dim=0).cpu()
    at = torch.rand((), generator=generator, dtype=torch.float64)
    return min(int(torch.searchsorted(cumulative, at, right=True)), len(cumulative) - 1)


class ARTransformerObjective(LatentObjective):
    """Mean cross-entropy of the next code, over all orderings.

    Args:
        detector: the `ARTransformer` whose transformers are trained; its latent space stays frozen.
    """

    def __init__(self, detector: ARTransformer) -> None:
        super().__init__()
        self.detector = detector

    def losses_of(self, mean: Tensor, std: Tensor, foreground: Tensor | None) -> dict[str, Tensor]:
        """Key `loss`."""
        codes = self.detector.codes(mean)
        losses = []
        for index in range(len(self.detector.transformers)):
            sequence, _ = self.detector.sequence(codes, index)
            logits = self.detector.logits(sequence, index).float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), sequence.flatten()))
        return {"loss": torch.stack(losses).mean()}
