"""Small models of every shape, and folders of them as Hugging Face has them."""

from pathlib import Path

import torch

from conf.schema import Model
from tests.model import parity

MODEL = {
    "vocab_size": 64,
    "hidden": 32,
    "layers": 3,
    "dense_layers": 1,
    "heads": 2,
    "q_rank": 16,
    "kv_rank": 16,
    "nope_head_dim": 16,
    "rope_head_dim": 8,
    "v_head_dim": 16,
    "dense_width": 64,
    "expert_width": 16,
    "experts": 8,
    "top_k": 4,
    "groups": 4,
    "top_groups": 2,
    "mtp_depth": 0,
}
SEQ_LEN = 24


def transformers_folder(path: Path, model: Model, **options):
    """transformers' model with random weights, saved by transformers itself; returns it."""
    theirs = parity.transformers_model(model, SEQ_LEN)
    parity.randomise(theirs, 0.1)
    theirs.save_pretrained(path, **options)
    return theirs.eval()


def tokens(model: Model, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (2, SEQ_LEN), generator=generator)
