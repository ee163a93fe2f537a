"""MONAI's `DecoderOnlyTransformer` read token by token, without reading the tokens before again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import DecoderOnlyTransformer
from torch import Tensor


def lean_transformer(num_tokens: int, max_seq_len: int, dim: int, depth: int, heads: int) -> DecoderOnlyTransformer:
    """MONAI's transformer with flash attention, whose causal masks, L x L a block, are not part of the state dict."""
    transformer = DecoderOnlyTransformer(
        num_tokens=num_tokens,
        max_seq_len=max_seq_len,
        attn_layers_dim=dim,
        attn_layers_depth=depth,
        attn_layers_heads=heads,
        use_flash_attention=True,
    )
    blocks: Any = transformer.blocks
    causal_mask = blocks[0].attn.causal_mask
    for block in blocks:
        del block.attn.causal_mask
        block.attn.register_buffer("causal_mask", causal_mask, persistent=False)
    return transformer


class TokenReader:
    """Reads sequences in pieces of any length and keeps the keys and values of what it has read.

    A token costs one pass through the linear layers and attention to the tokens before it, so walking L tokens costs
    about as much as one pass over the whole sequence, instead of L of them.

    Args:
        transformer: without dropout, cross-attention or combined linear layers, as `lean_transformer` makes it.
    """

    def __init__(self, transformer: DecoderOnlyTransformer) -> None:
        self.transformer: Any = transformer
        self.keys_values: list[tuple[Tensor, Tensor]] = []  # of each block, (B, heads, longest sequence, d)
        self.length = 0

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """The next tokens (B, n) int64 -> logits (B, n, V) of the token after each.

        Raises ValueError where the sequence becomes longer than the transformer's.
        """
        start, end = self.length, self.length + tokens.shape[1]
        if end > self.transformer.max_seq_len:
            raise ValueError(f"a sequence of {end} tokens is longer than {self.transformer.max_seq_len}")
        positions = self.transformer.position_embeddings.embedding.weight[start:end]
        x = self.transformer.token_embeddings(tokens) + positions
        for index, block in enumerate(self.transformer.blocks):
            x = x + self._attend(block, x, index)
            x = x + block.mlp(block.norm2(x))
        self.length = end
        return self.transformer.to_logits(x)

    def _attend(self, block: Any, x: Tensor, index: int) -> Tensor:
        attention, x = block.attn, block.norm1(x)
        q, k, v = (attention.input_rearrange(f(x)) for f in (attention.to_q, attention.to_k, attention.to_v))
        n, end = q.shape[2], self.length + q.shape[2]
        if index == len(self.keys_values):
            size = (*k.shape[:2], self.transformer.max_seq_len, k.shape[3])
            self.keys_values.append((k.new_empty(size), v.new_empty(size)))
        for kept, new in zip(self.keys_values[index], (k, v), strict=True):
            kept[:, :, self.length : end] = new
        k, v = (kept[:, :, :end] for kept in self.keys_values[index])
        seen = None if n == 1 else attention.causal_mask[:, :, end - n : end, :end] > 0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=attention.scale)
        return attention.out_proj(attention.out_rearrange(attended))
