"""Prefill and decoding on cached latents give what the training model gives on the whole text."""

from dataclasses import replace

import pytest
import torch

from conf.load import compose
from conf.schema import Model, SparseAttention, Yarn
from tests.model.test_parity import random_config
from train.generate.cache import FIRST_COLUMNS, LatentCache, bytes_per_token, multi_head_bytes_per_token
from train.generate.decoder import Decoder
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.model.deepseek import DeepSeekV3

torch.set_num_threads(1)
FP32 = torch.float32


def random_model(config: Model, seq_len: int, dtype: torch.dtype = FP32) -> DeepSeekV3:
    """Weights, gains and balance biases with nothing special about them."""
    torch.manual_seed(1)
    model = DeepSeekV3.whole(config, HighPrecision(dtype, build_kernels("cpu")), seq_len=seq_len)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
        for router in model.routers().values():
            router.bias_E.normal_(0, 0.1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def feed(decoder: Decoder, tokens_BT: torch.Tensor, pieces: list[int], starts: list[int]) -> torch.Tensor:
    """Logits (B, T, V) of a text that comes in pieces of these lengths."""
    cache = decoder.new_cache(starts)
    parts = []
    for piece in tokens_BT.split(pieces, 1):
        parts.append(decoder.logits(decoder.hidden(piece, cache)))
        cache.commit(piece.size(1))
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_prefill_and_decode_equal_the_full_forward(seed):
    config, seq_len = random_config(seed)
    model = random_model(config, seq_len)
    tokens_BT = torch.randint(config.vocab_size, (3, seq_len))
    found = feed(Decoder(model, seq_len), tokens_BT, [seq_len // 2] + [1] * (seq_len - seq_len // 2), [0, 0, 0])
    # Both are fp32; only the order of the products differs.
    torch.testing.assert_close(found, model.logits(tokens_BT), atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["", "FS"])
def test_sparse_attention_chooses_the_same_keys_of_a_cache(pattern):
    config, seq_len = random_config(3)
    config = replace(config, layers=2, dense_layers=1, q_rank=12, mtp_depth=0)
    config.sparse = SparseAttention(heads=3, head_dim=config.rope_head_dim + 4, top_k=5, pattern=pattern)
    seq_len = config.max_seq_len = max(24, seq_len)
    model = random_model(config, seq_len)
    tokens_BT = torch.randint(config.vocab_size, (3, seq_len))
    decoder, pieces = Decoder(model, seq_len), [9, 3] + [1] * (seq_len - 12)
    found = feed(decoder, tokens_BT, pieces, [0, 0, 0])
    torch.testing.assert_close(found, model.logits(tokens_BT), atol=2e-5, rtol=0)
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), tokens_BT], 1)
    again = feed(decoder, padded, [13, 3] + [1] * (seq_len - 12), [4, 4, 4])[:, 4:]
    torch.testing.assert_close(again, found, atol=2e-5, rtol=0)
    indexers = 1 if pattern else 2
    assert bytes_per_token(config, 4) == 4 * (
        2 * (config.kv_rank + config.rope_head_dim) + indexers * config.sparse.head_dim
    )


@torch.no_grad()
def test_bf16_differs_by_no_more_than_its_rounding():
    config, seq_len = random_config(3)
    config.dense_layers = config.layers  # an expert chosen otherwise near a tie is a jump, not rounding
    exact = random_model(config, seq_len)
    tokens_BT = torch.randint(config.vocab_size, (4, seq_len))
    expected = exact.logits(tokens_BT)
    rounded = random_model(config, seq_len, torch.bfloat16)
    found = feed(Decoder(rounded, seq_len), tokens_BT, [1] * seq_len, [0] * 4)
    # The absorbed form rounds at other places than the training form (2^-9 each time), so both are compared with fp32:
    # the error of one must not exceed twice that of the other.
    error, training_error = ((x - expected).square().mean().sqrt() for x in (found, rounded.logits(tokens_BT)))
    assert error < 2 * training_error < 0.1 * expected.std()


@torch.no_grad()
def test_left_padding_changes_nothing():
    config, seq_len = random_config(5)
    model = random_model(config, seq_len)
    for lengths in ([seq_len, seq_len - 3, 1], [seq_len, seq_len - 1]):
        tokens_BT = torch.randint(config.vocab_size, (len(lengths), seq_len + 4))  # a junk token before each start
        found = feed(Decoder(model, seq_len), tokens_BT, [seq_len, 1, 2, 1], [seq_len - n for n in lengths])
        for row, length in enumerate(lengths):
            alone = model.logits(tokens_BT[row : row + 1, seq_len - length :])
            torch.testing.assert_close(found[row, seq_len - length :], alone[0], atol=2e-5, rtol=0)
        assert found.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(
    "yarn", [{"original_seq_len": 64}, {"original_seq_len": 16, "factor": 2.0, "query_growth": 0.5}]
)
def test_a_long_prompt_in_blocks_and_a_growing_cache(yarn):
    """And queries that grow with their position."""
    config = Model(
        vocab_size=50, hidden=16, layers=2, dense_layers=2, heads=3, q_rank=None, kv_rank=8, nope_head_dim=6,
        rope_head_dim=4, v_head_dim=5, dense_width=24, mtp_depth=0, yarn=Yarn(**yarn),
    )  # fmt: skip
    seq_len = 3 * FIRST_COLUMNS + 11
    model = random_model(config, seq_len)
    tokens_BT = torch.randint(50, (2, seq_len))
    pieces = [FIRST_COLUMNS - 2, 1, 2, 1]
    pieces.append(seq_len - sum(pieces))
    found = feed(Decoder(model, seq_len), tokens_BT, pieces, [0, 0])
    torch.testing.assert_close(found, model.logits(tokens_BT), atol=2e-5, rtol=0)


@torch.no_grad()
def test_uncommitted_entries_leave_no_trace():
    config, seq_len = random_config(7)
    decoder = Decoder(random_model(config, seq_len), seq_len)
    tokens_BT = torch.randint(config.vocab_size, (2, 9))
    junk_BT = torch.randint(config.vocab_size, (2, 3))
    expected = feed(decoder, tokens_BT, [5, 4], [0, 0])[:, 5:]
    cache = decoder.new_cache([0, 0])
    decoder.hidden(tokens_BT[:, :5], cache)
    cache.commit(5)
    decoder.hidden(torch.cat([tokens_BT[:, 5:7], junk_BT[:, :1]], 1), cache)
    cache.commit(2)
    found = decoder.logits(decoder.hidden(tokens_BT[:, 7:9], cache))
    torch.testing.assert_close(found, expected[:, 2:], atol=2e-5, rtol=0)
    cache.keep([1])
    found = decoder.logits(decoder.hidden(tokens_BT[1:, 7:9], cache))
    torch.testing.assert_close(found[0], expected[1, 2:], atol=2e-5, rtol=0)


def test_bytes_per_token_are_those_of_the_paper_and_of_the_tensors():
    v3 = compose("conf=deepseek_v3", "data.path=/somewhere").model
    assert bytes_per_token(v3, 2) == 70_272  # arXiv 2505.09343
    assert multi_head_bytes_per_token(v3, 2) == 61 * 128 * (192 + 128) * 2
    cache = LatentCache(v3, [0], torch.bfloat16, torch.device("meta"))
    assert cache.nbytes == FIRST_COLUMNS * bytes_per_token(v3, 2)
