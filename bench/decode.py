"""Tokens per second of generation beside transformers' generate on the same weights.

    python -m bench.decode [--shape debug|tiny] [--dtype bf16|fp32] [--batch 1] [--prompt 32] [--tokens 128] [--threads
    1]

Gives our model the random weights of transformers' DeepseekV3ForCausalLM. Both models continue the
same prompts greedily by the same number of tokens, in one process, in turns, so that machine noise affects both;
prefill counts. transformers runs with generate's defaults; version 5.24 caches the latents too, and recomputes keys and
values of all earlier tokens at every step. Prints medians, the ratio with its range over the rounds, and the real bytes
per token of each cache.

Takes about 2 minutes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import train.kernels.cpu.tuned  # noqa: F401  before torch allocates anything

# isort: split
import torch

from bench.train_step import SHAPES
from conf.load import compose
from train.generate.cache import bytes_per_token, multi_head_bytes_per_token
from train.generate.decoder import Decoder
from train.generate.generation import Generation, Limits
from train.generate.sampling import Sampler
from train.kernels.choice import build_kernels
from train.kernels.plain.high import HighPrecision
from train.model.deepseek import DeepSeekV3

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="debug")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure_beside_transformers(options)


def measure_beside_transformers(options: argparse.Namespace) -> None:
    from tests.model import parity

    torch.manual_seed(1)
    length = options.prompt + options.tokens
    overrides = [f"model.{key}={'null' if value is None else value}" for key, value in SHAPES[options.shape].items()]
    config = compose(*overrides, "model.mtp_depth=0", f"seq_len={length}").model
    dtype = DTYPES[options.dtype]
    theirs = parity.transformers_model(config, length)
    parity.randomise(theirs, 0.04)
    ours = DeepSeekV3.whole(config, HighPrecision(dtype, build_kernels("cpu")), seq_len=length)
    parity.load(ours, theirs)
    for parameter in ours.parameters():
        parameter.data = parameter.data.to(dtype)
    theirs, decoder = theirs.to(dtype).eval(), Decoder(ours.eval(), length)
    tokens_BT = torch.randint(config.vocab_size, (options.batch, options.prompt))
    settings = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}

    def run_theirs():
        with torch.inference_mode():
            return theirs.generate(
                tokens_BT, attention_mask=torch.ones_like(tokens_BT), use_cache=True, pad_token_id=0,
                return_dict_in_generate=True, **settings,
            )  # fmt: skip

    def run_ours() -> Generation:
        limits = Limits(options.tokens, length, end_ids=frozenset())
        generation = Generation(decoder, tokens_BT.tolist(), Sampler(config.vocab_size, temperature=0), limits, seed=1)
        for _ in generation.steps():
            pass
        return generation

    same = torch.tensor(run_ours().tokens) == run_theirs().sequences[:, options.prompt :]
    rates = take_turns({"ours": run_ours, "transformers": run_theirs}, options.rounds, options.batch * options.tokens)
    print(
        f"{options.shape}, {options.dtype}, {options.threads} thread(s), batch {options.batch}, {options.prompt} + "
        f"{options.tokens} tokens; {same.float().mean():.0%} of the tokens are the same"
    )
    show(rates)
    output = run_theirs()
    layers = (output.cache if "cache" in output else output.past_key_values).layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    columns = layers[0].keys.size(-2)
    print(
        f"  cache per token: ours {bytes_per_token(config, dtype.itemsize):,} bytes, transformers "
        f"{held / options.batch / columns:,.0f}, equal multi-head attention "
        f"{multi_head_bytes_per_token(config, dtype.itemsize):,}"
    )


def take_turns(sides: dict[str, Callable], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Runs the sides in turns. Returns the tokens per second of each side in each round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            rates[name].append(tokens / (time.perf_counter() - began))
    return rates


def show(rates: dict[str, list[float]]) -> None:
    for name, values in rates.items():
        print(f"  {name:13} {statistics.median(values):8.1f} tokens/s  ({min(values):.1f} to {max(values):.1f})")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(f"  ratio {statistics.median(ratios):.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
