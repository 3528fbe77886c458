"""Text from a checkpoint, in one process: what the model has learnt to write."""

from pathlib import Path

import psutil
import torch

from conf.schema import Config
from parallel.shard import whole
from train.checkpoint.load import load
from train.data.tokenizer import Tokenizer
from train.model.count import count
from train.model.deepseek import DeepSeekV3
from train.model.init import materialise
from train.precision.build import activation_dtype, build_precision


def fits_here(config: Config) -> bool:
    """Whether one process of this machine has memory for the whole model, in fp32 while it loads."""
    counts = count(config.model)
    return 4 * (counts.total + counts.mtp) < psutil.virtual_memory().available / 2


def load_model(config: Config, checkpoint: Path, device: torch.device) -> DeepSeekV3:
    """The whole model in eval mode, from a checkpoint of any layout."""
    dtype, precision = activation_dtype(config.precision), build_precision(config.precision, device)
    model = DeepSeekV3.whole(config.model, precision, seq_len=config.seq_len, device="meta")
    materialise(model, "cpu")
    shards = {f"master.{name}": whole(param) for name, param in model.named_parameters()}
    load(checkpoint, shards | {f"bias.{name}": whole(router.bias_E) for name, router in model.routers().items()})
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model.to(device).eval()


@torch.no_grad()
def generate(
    model: DeepSeekV3, tokenizer: Tokenizer, tokens: int, *, window: int, seed: int, temperature: float = 0.8
) -> str:
    """A new document of at most this many tokens. window: tokens that the model sees at a time."""
    generator = torch.Generator().manual_seed(seed)
    device = model.head.weight.device
    ids = [tokenizer.eos_id]  # every document follows the end of another
    while len(ids) <= tokens:
        logits_V = model.logits(torch.tensor([ids[-window:]], device=device), last=True)[0, 0].cpu()
        logits_V = logits_V[: tokenizer.vocab_size]  # rows beyond the tokenizer mean nothing
        chosen = torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator).item()
        if chosen == tokenizer.eos_id:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[1:])
