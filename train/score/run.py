"""mode=score: writes a model's log-probabilities of given samples to a Parquet file.

One row per sample, in the order of the file. Its columns are:

    sample     index of the sample
    tokens     token ids of the sample
    logprobs   log-probability of every token given the earlier tokens, in nats, at temperature 1; null for token 0
    first      index of the completion's first token; 1 without a completion
    logprob    sum of logprobs over token `first` and all later tokens
    count      number of tokens in that sum
    experts    ids of the chosen experts, see EXPERTS_COLUMN; only with score.routing=write
    keys       positions that sparse attention chose, see KEYS_COLUMN; only with score.keys=write; null for a sample
               of at most top_k tokens
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from cluster.place import Place
from conf.errors import EXIT_OK, UserError
from conf.schema import Config, ScoredRouting
from conf.words import one_line, say, say_note
from train.generate.decoder import Decoder, KeyTap, RoutingTap
from train.generate.source import open_weights
from train.rank import choose_device
from train.score.scored_samples import ScoredSample, read_scored_samples

SCORE_COLUMNS = pyarrow.schema(
    {
        "sample": pyarrow.int64(),
        "tokens": pyarrow.list_(pyarrow.int32()),
        "logprobs": pyarrow.list_(pyarrow.float32()),
        "first": pyarrow.int32(),
        "logprob": pyarrow.float64(),
        "count": pyarrow.int32(),
    }
)
EXPERTS_COLUMN = pyarrow.field("experts", pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.int16()))))
"""Ids of the chosen experts, by token (except the last) and by MoE layer."""
KEYS_COLUMN = pyarrow.field("keys", pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.int32()))))
"""Ascending positions of chosen keys, by token and layer with an indexer."""
ROWS_AT_ONCE = 256
"""Number of samples that one write call adds to the file."""


def score(config: Config) -> int:
    """Score all samples and write the results to the file that the key score.to names. Returns the exit code."""
    assert config.score.data is not None and config.score.to is not None, "conf/check.py asks for them"
    target = Path(config.score.to).expanduser().absolute()
    if target.exists():
        raise UserError("score.to", target, "exists already", "give the name of a new file")
    source = open_weights(config, choose_device(config, Place()), config.score.checkpoint, "score.checkpoint")
    for note in source.notes:
        say_note(note)
    path, size = Path(config.score.data).expanduser(), source.decoder.config.vocab_size
    how = config.score.routing
    tap = None if how is ScoredRouting.own else RoutingTap(source.decoder.model)
    if tap is not None and not tap.shape[0]:
        rule = "applies to experts, and this model has none"
        raise UserError("score.routing", how.name, rule, "set score.routing=own")
    key_how = config.score.keys
    keys = None if key_how is ScoredRouting.own else KeyTap(source.decoder)
    if keys is not None and not keys.shape[0]:
        rule = "is of sparse attention, and no layer of this model has an indexer"
        raise UserError("score.keys", key_how.name, rule, "set score.keys=own")
    replayed_keys = keys.shape if keys is not None and key_how is ScoredRouting.replay else None
    replayed = tap.shape if tap is not None and how is ScoredRouting.replay else None
    samples = read_scored_samples(
        path, source.tokenizer.encode, source.start_id, size, source.context, replayed, replayed_keys
    )
    columns = SCORE_COLUMNS.append(EXPERTS_COLUMN) if how is ScoredRouting.write else SCORE_COLUMNS
    columns = columns.append(KEYS_COLUMN) if key_how is ScoredRouting.write else columns
    _write(target, _rows(source.decoder, samples, config.model.loss_chunk, tap, keys), columns)
    counted = sum(len(sample.tokens) - sample.first for sample in samples)
    say(one_line(f"Scored {len(samples)} samples, {counted} tokens, with {source.title}: {target}"))
    return EXIT_OK


@torch.no_grad()
def logprobs(decoder: Decoder, tokens: list[int], chunk: int) -> Tensor:
    """Return the log-probabilities of all tokens except the first, fp64 on the host, (T - 1,).

    chunk: number of tokens whose logits are in memory.
    """
    tokens_BT = torch.tensor([tokens], device=decoder.device)
    hidden_TD = decoder.hidden(tokens_BT[:, :-1], decoder.new_cache([0]))[0]
    targets_T1 = tokens_BT[0, 1:, None]
    parts = [
        decoder.logits(hidden).log_softmax(-1).gather(1, targets)
        for hidden, targets in zip(hidden_TD.split(chunk), targets_T1.split(chunk), strict=True)
    ]
    return torch.cat(parts)[:, 0].double().cpu()


def _rows(
    decoder: Decoder, samples: list[ScoredSample], chunk: int, tap: RoutingTap | None, keys: KeyTap | None
) -> Iterator[dict]:
    """Yield one row per sample, with all possible columns."""
    for number, sample in enumerate(samples):
        if tap is not None and sample.experts is not None:
            tap.given_TLK = torch.tensor(sample.experts, device=decoder.device)
        if keys is not None and sample.keys is not None:
            rows = [[[*layer, *[-1] * (keys.shape[1] - len(layer))] for layer in of_token] for of_token in sample.keys]
            keys.given_TLK = torch.tensor(rows, dtype=torch.int32)
        found_T = logprobs(decoder, sample.tokens, chunk)
        if not torch.isfinite(found_T).all():
            raise UserError(
                "score.checkpoint",
                number,
                "gives a log-probability that is not finite for this sample",
                "give other weights",
            )
        yield {
            "sample": number,
            "tokens": sample.tokens,
            "logprobs": [None, *found_T.tolist()],
            "first": sample.first,
            "logprob": found_T[sample.first - 1 :].sum().item(),
            "count": len(sample.tokens) - sample.first,
            "experts": None if tap is None else tap.take().tolist(),
            "keys": None if keys is None else keys.take(),
        }


def _write(target: Path, rows: Iterator[dict], columns: pyarrow.Schema) -> None:
    """Write rows to a hidden file that then becomes the target."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with pyarrow.parquet.ParquetWriter(temporary, columns) as writer:
            waiting = []
            for row in rows:
                waiting.append(row)
                if len(waiting) == ROWS_AT_ONCE:
                    writer.write_table(pyarrow.Table.from_pylist(waiting, columns))
                    waiting = []
            writer.write_table(pyarrow.Table.from_pylist(waiting, columns))
        temporary.rename(target)
    except OSError as error:
        raise UserError(
            "score.to", target, f"cannot be written: {error}", "correct that, or give another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
