"""One call from a prompt to its continuation."""

from typing import Required, TypedDict, Unpack

from cluster.got_on import got_on
from train.generate.generation import Generation, Limits
from train.generate.sampling import Sampler
from train.generate.source import LoadedModel
from train.generate.text import require_utf8


class GenerationOptions(TypedDict, total=False):
    """What `start` takes by name."""

    tokens: Required[int]
    temperature: float
    top_p: float
    seed: int
    speculative: bool


def start(
    source: LoadedModel,
    prompts: list[str],
    *,
    tokens: int,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 1,
    speculative: bool = False,
) -> Generation:
    """A generation of these prompts that has not begun. Raises UserError for a prompt over the context or not in UTF-8."""
    for prompt in prompts:
        require_utf8(prompt, "generate.prompt")
    return Generation(
        source.decoder,
        [[source.start_id, *source.tokenizer.encode(prompt)] for prompt in prompts],
        Sampler(source.tokenizer.vocab_size, temperature, top_p),
        Limits(tokens, source.context, frozenset(source.tokenizer.stop_ids)),
        seed=seed,
        speculative=speculative,
    )


def complete(source: LoadedModel, prompt: str, **how: Unpack[GenerationOptions]) -> str:
    """The continuation of a prompt, of at most `tokens` tokens. how: as `start` takes it."""
    generation = start(source, [prompt], **how)
    for _ in generation.steps():
        got_on()
    return source.tokenizer.decode(generation.tokens[0])
