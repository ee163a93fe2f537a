import pytest
import torch

from common.networks.cached_transformer import TokenReader, lean_transformer


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return lean_transformer(num_tokens=7, max_seq_len=12, dim=8, depth=3, heads=2).eval()


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 3, 2], [1, 11]])
@torch.no_grad()
def test_reading_in_pieces_is_reading_at_once(transformer, pieces):
    tokens = torch.randint(7, (3, 12), generator=torch.Generator().manual_seed(0))
    reader = TokenReader(transformer)
    logits = torch.cat([reader.read(part) for part in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(logits, transformer(tokens), atol=1e-5, rtol=1e-4)
    assert reader.length == 12


@torch.no_grad()
def test_later_tokens_do_not_matter_and_earlier_ones_do(transformer):
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    logits = transformer(tokens)
    tokens[0, 5] = 3
    changed = (transformer(tokens) - logits).abs().amax(dim=2)[0] > 1e-4
    assert not changed[:5].any()
    assert changed[5:].all()


def test_causal_masks_are_not_part_of_the_weights(transformer):
    assert not [name for name in transformer.state_dict() if "causal_mask" in name]
    assert all(block.attn.causal_mask.shape == (1, 1, 12, 12) for block in transformer.blocks)


def test_sequence_that_is_too_long_is_refused(transformer):
    reader = TokenReader(transformer)
    reader.read(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="13 tokens"):
        reader.read(torch.zeros(1, 1, dtype=torch.int64))


def test_parameters_of_the_tutorial():
    transformer = lean_transformer(num_tokens=17, max_seq_len=256, dim=128, depth=16, heads=16)
    used = [p for name, p in transformer.named_parameters() if "norm_cross_attn" not in name]
    assert sum(p.numel() for p in used) in (3_207_441, 3_207_441 - 16 * 256)
