"""MONAI's VQ-VAE with a codebook that does not collapse, and with the interface of `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from monai.networks.layers.vector_quantizer import EMAQuantizer
from monai.networks.nets import VQVAE
from torch import Tensor, nn

from ..errors import SettingError
from ..recorded import Recorded

DECAY = 0.99  # of the moving averages


class VQAutoencoder(Recorded, nn.Module):
    """VQ-VAE (van den Oord et al., NeurIPS 2017); each entry of `channels` halves the resolution, first of all.

    `encode` and `decode` are those of `AutoencoderKL`, with no variance, so that it can be the autoencoder of a
    `LatentSpace`. Neither touches the codebook, which MONAI's `index_quantize` updates whenever it is in training mode.

    The codebook follows the encoder by moving averages. MONAI's starts from cluster sizes of 0 and normal codes: the
    first update multiplies unused codes by 1e5, and one code of all is in use for long. Here codes that hardly any
    cell uses, which at the beginning are all, (re)start from encoder outputs of the batch: codes that on average over
    1 / (1 - `DECAY`) batches fewer than `restart_below` cells use. The weight of the commitment is MONAI's 0.25; the
    paper gives none.

    Args:
        channels: width of each level; `len(channels)` is log2 of the downsampling factor. (256, 256) at paper size.
        num_res_layers: residual units per level.
        num_embeddings: codes, K.
        embedding_dim: channels of the latent, C_z.
    """

    restart_below = 0.1

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (64, 128),
        num_res_layers: int = 2,
        num_embeddings: int = 256,
        embedding_dim: int = 32,
    ) -> None:
        super().__init__()
        self.vqvae = VQVAE(
            spatial_dims=2,
            in_channels=in_channels,
            out_channels=in_channels,
            channels=channels,
            num_res_layers=num_res_layers,
            num_res_channels=channels,
            downsample_parameters=((2, 4, 1, 1),) * len(channels),
            upsample_parameters=((2, 4, 1, 1, 0),) * len(channels),
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            commitment_cost=0.25,
            decay=DECAY,
        )
        # sums over a batch: at paper size they exceed what the half precision of a weights file holds
        self.quantizer.ema_cluster_size = self.quantizer.ema_cluster_size.double()
        self.quantizer.ema_w = self.quantizer.ema_w.double()

    @property
    def quantizer(self) -> EMAQuantizer:
        """MONAI's quantiser, with the codebook in `embedding`."""
        return self.vqvae.quantizer.quantizer

    @property
    def num_embeddings(self) -> int:
        """Codes, K."""
        return self.quantizer.num_embeddings

    def nearest_codes(self, z: Tensor) -> Tensor:
        """Indices of the nearest codes: (B, C_z, h, w) -> (B, h, w) int64 in [0, K)."""
        with torch.autocast(z.device.type, enabled=False):  # MONAI turns it off on CUDA only
            return self.quantizer.quantize(z.float())[2]

    def embed(self, codes: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, C_z, h, w). Raises SettingError where an index is outside the codebook."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_embeddings:
            fact = f"indices from {codes.min()} to {codes.max()} are not in [0, {self.num_embeddings})"
            raise SettingError("codes", fact, "use codes of this codebook")
        return self.quantizer.embed(codes)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised latent and zeros: (B, C, H, W) -> two of (B, C_z, H / f, W / f)."""
        z = self.embed(self.nearest_codes(self.vqvae.encode(x)))
        return z, torch.zeros_like(z)

    def decode(self, z: Tensor) -> Tensor:
        """Quantise and decode: (B, C_z, H / f, W / f) -> (B, C, H, W)."""
        return self.vqvae.decode(self.embed(self.nearest_codes(z)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, commitment loss and code indices (B, h, w); updates the codebook in training mode."""
        z = self.vqvae.encode(x)
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.training:
                self.restart_unused_codes(z)
            quantised, commitment, codes = self.quantizer(z)
        return self.vqvae.decode(quantised), commitment, codes

    @torch.no_grad()
    def restart_unused_codes(self, z: Tensor) -> None:
        """Replace codes that are not in use by encoder outputs z, (B, C_z, h, w), far from each other and the rest."""
        quantizer = self.quantizer
        unused = quantizer.ema_cluster_size < self.restart_below
        if not unused.any():
            return
        weight = quantizer.embedding.weight
        codes = far_apart(z.movedim(1, -1).flatten(0, -2), weight[~unused], int(unused.sum()))
        if dist.is_initialized():
            dist.broadcast(codes, src=0)
        weight[unused] = codes
        quantizer.ema_w[unused] = codes.double()
        quantizer.ema_cluster_size[unused] = 1.0


def far_apart(points: Tensor, taken: Tensor, count: int) -> Tensor:
    """`count` of the points, each drawn by its squared distance from those taken before (k-means++, Arthur 2007).

    So the many equal cells of the background take one code. points: (n, d);  taken: (m, d). From the global generator.
    """
    nearest = torch.cdist(points, taken).amin(dim=1).square() if len(taken) else torch.ones_like(points[:, 0])
    chosen = []
    for _ in range(count):
        index = torch.multinomial(nearest + 1e-12, 1)  # where all points are taken, any
        chosen.append(points[index])
        nearest = torch.minimum(nearest, (points - points[index]).square().sum(dim=1))
    return torch.cat(chosen)


def codebook_use(codes: Tensor, num_embeddings: int) -> tuple[Tensor, Tensor]:
    """How many codes occur, and the perplexity exp(H) of their frequencies, in [1, K]; codes: any shape, int64."""
    share = torch.bincount(codes.flatten(), minlength=num_embeddings) / codes.numel()
    return (share > 0).sum(), torch.exp(torch.special.entr(share).sum())
