"""Reads the samples of mode=score from JSONL or Parquet as token ids. Errors name the line or row. Imports no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.errors import UserError
from train.data.readers import check_text, read_jsonl_records, read_parquet_records
from train.data.sources import find_files

SCORE_DATA = "score.data"
FORMS = (("tokens",), ("prompt", "completion"), ("text",))
"""Accepted forms of a sample, each as a set of keys. The first form whose keys are all present is used."""
RULE = "must have tokens (a list of ids), prompt and completion, or text"


@dataclass(frozen=True)
class ScoredSample:
    """One sample as token ids."""

    tokens: list[int]
    first: int
    """Index of the first token whose log-probability is summed; at least 1."""
    experts: list | None = None
    """Expert ids to replay, by token, MoE layer, choice; None: no replay."""
    keys: list | None = None
    """Positions to attend to, by token and layer with an indexer, or None."""


def read_scored_samples(
    path: Path,
    encode: Callable[[str], list[int]],
    start_id: int,
    vocab_size: int,
    longest: int,
    replayed: tuple[int, int, int] | None = None,
    replayed_keys: tuple[int, int] | None = None,
) -> list[ScoredSample]:
    """Read all samples of a file (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), in order.

    - encode: converts text to ids.
    - start_id: the token before every text.
    - longest: maximum tokens of a sample.
    - replayed: (MoE layers, experts per token, experts per layer), if each sample must prescribe its experts.
    - replayed_keys: (layers with an indexer, positions per token), if each sample must prescribe its attended
      positions.

    Raises UserError for an unreadable file, and for the first invalid sample.
    """
    if not path.is_file():
        raise UserError(SCORE_DATA, path, "no such file", "give a .jsonl or .parquet of samples")
    found = []
    for place, record in _read(path):
        sample = _sample(place, record, encode, start_id)
        if len(sample.tokens) > longest:
            rule = f"has {len(sample.tokens)} tokens, and the model reads at most {longest}"
            raise UserError(SCORE_DATA, place, rule, "shorten it, or leave it out")
        if wrong := [token for token in sample.tokens if not 0 <= token < vocab_size]:
            rule = f"has token {wrong[0]}, and the model's tokens are 0 to {vocab_size - 1}"
            raise UserError(SCORE_DATA, place, rule, "give the ids of this model's tokenizer")
        if len(sample.tokens) < 2:
            raise UserError(
                SCORE_DATA,
                place,
                "must have at least two tokens: the first token has no log-probability",
                "leave it out",
            )
        if sample.first == len(sample.tokens):
            raise UserError(SCORE_DATA, place, "has a completion without a token", "leave it out")
        if replayed is not None:
            sample = _with_experts(sample, place, record, *replayed)
        found.append(sample if replayed_keys is None else _with_keys(sample, place, record, *replayed_keys))
    if not found:
        raise UserError(SCORE_DATA, path, "has no sample", "give a file with one sample per line or row")
    return found


def _sample(place: str, record: dict[str, Any], encode: Callable[[str], list[int]], start_id: int) -> ScoredSample:
    """Convert a record to token ids, prompt and completion separately."""
    form = next((form for form in FORMS if all(record.get(key) is not None for key in form)), None)
    if form is None:
        raise UserError(
            SCORE_DATA, place, f"{RULE}, and has only: {', '.join(map(str, list(record)[:8]))}", "rename its keys"
        )
    if form == ("tokens",):
        tokens = record["tokens"]
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError(SCORE_DATA, place, "must have a list of whole numbers under tokens", "correct or remove it")
        first = record.get("first")
        if first is not None and not (type(first) is int and 1 <= first < max(2, len(tokens))):
            rule = f"must have under first the place of the completion's first token, 1 to {len(tokens) - 1}"
            raise UserError(SCORE_DATA, place, rule, "correct it, or leave it out to count all tokens")
        return ScoredSample(tokens, first or 1)
    texts = [encode(check_text(record[key], place, key, SCORE_DATA)) for key in form]
    before = [start_id, *(texts[0] if len(texts) > 1 else [])]
    return ScoredSample([*before, *texts[-1]], len(before))


def _with_experts(
    sample: ScoredSample, place: str, record: dict[str, Any], layers: int, top_k: int, experts: int
) -> ScoredSample:
    """Return the sample with its expert ids. Raises UserError for invalid ids."""
    given, positions = record.get("experts"), len(sample.tokens) - 1
    good = isinstance(given, list) and len(given) in (positions, positions + 1)
    if not (good and all(_is_choice(of_token, layers, top_k, experts) for of_token in given)):
        rule = (
            f"must have under experts, for each of its {positions} tokens but the last, {layers} lists (one a MoE layer) of {top_k} different "
            f"experts, 0 to {experts - 1}"
        )
        raise UserError(SCORE_DATA, place, rule, "write them as score.routing=write does, or set score.routing=own")
    return replace(sample, experts=given[:positions])


def _with_keys(sample: ScoredSample, place: str, record: dict[str, Any], layers: int, top_k: int) -> ScoredSample:
    """Return the sample with its `keys`. Raises UserError for invalid positions."""
    given, positions = record.get("keys"), len(sample.tokens) - 1
    if given is None and positions <= top_k:
        return sample
    good = isinstance(given, list) and len(given) in (positions, positions + 1)
    seen = enumerate(given, 1) if good else ()  # each token with the number of positions that it can see
    if not (good and all(_is_choice(of_token, layers, min(count, top_k), count) for count, of_token in seen)):
        rule = (
            f"must have under keys, for each of its {positions} tokens but the last, {layers} lists (one a layer that chooses) of {top_k} "
            "different positions, from 0 to the token's own, or all of these"
        )
        raise UserError(SCORE_DATA, place, rule, "write them as score.keys=write does, or set score.keys=own")
    return replace(sample, keys=given[:positions])


def _is_choice(of_token: Any, layers: int, chosen: int, among: int) -> bool:
    """Return whether a token's choice is valid: in every layer it has `chosen` different ids, all below `among`."""
    return (
        isinstance(of_token, list)
        and len(of_token) == layers
        and all(isinstance(ids, list) and all(type(one) is int and 0 <= one < among for one in ids) for ids in of_token)
        and all(len(ids) == len({*ids}) == chosen for ids in of_token)
    )


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location (for errors) and the record of every sample."""
    file = find_files(path, SCORE_DATA)[0]
    parquet = path.suffix == ".parquet"
    records = read_parquet_records(file, SCORE_DATA, list) if parquet else read_jsonl_records(file, SCORE_DATA)
    for _, place, record in records:
        if not isinstance(record, dict):
            rule = f"{RULE}, and is a {type(record).__name__}"
            raise UserError(SCORE_DATA, place, rule, "write one object per line")
        yield place, record
