"""Loads a model into one process, from Sluice or Hugging Face files."""

from dataclasses import dataclass
from pathlib import Path

import torch

from conf.errors import UserError
from conf.files import read_json
from conf.schema import Config
from train.checkpoint.manifest import read_manifest
from train.checkpoint.run_folder import find_checkpoint
from train.checkpoint.stored_weights import load_hf_model, load_model, require_memory
from train.checkpoint.trained_with import tokenizer_of
from train.data.tokenizer import (
    TOKENIZER_SETTINGS_FILE,
    Tokenizer,
    check_fit,
    load_tokenizer,
    named_token,
    refuse_tiktoken,
)
from train.generate.decoder import Decoder, require_plain_blocks
from train.hf.folder import is_hf_folder, open_model
from train.kernels.choice import build_kernels
from train.kernels.precision import activation_dtype

FIELD = "generate.checkpoint"


@dataclass(frozen=True)
class LoadedModel:
    """A model that can generate, with its tokenizer."""

    decoder: Decoder
    tokenizer: Tokenizer
    context: int
    """Maximum length of a text, in tokens."""
    start_id: int
    """Token before every text."""
    title: str
    """Short description of the model for the user."""
    words: Path
    """Folder with the tokenizer and any chat template."""
    notes: tuple[str, ...] = ()
    """Messages about the model for the user."""


def open_weights(config: Config, device: torch.device, checkpoint: str | None, field: str = FIELD) -> LoadedModel:
    """Load the model of a checkpoint or Hugging Face folder. checkpoint=None: the run's newest intact checkpoint.

    Raises UserError; field: the configuration key that the error names.
    """
    given = checkpoint and Path(checkpoint).expanduser()
    if given and is_hf_folder(given):
        return _from_hugging_face(config, given, device, field)
    return _from_run(config, device, checkpoint, field)


def from_checkpoint(config: Config, checkpoint: Path, tokenizer: Tokenizer, device: torch.device) -> LoadedModel:
    """Load a checkpoint of the run that config describes."""
    decoder = Decoder(load_model(config, checkpoint, device), config.seq_len)
    title = f"{config.name}, step {read_manifest(checkpoint).step}"
    return LoadedModel(decoder, tokenizer, config.seq_len, tokenizer.eos_id, title, checkpoint.absolute().parents[1])


def _from_run(config: Config, device: torch.device, given: str | None, field: str) -> LoadedModel:
    require_plain_blocks(config.model)
    checkpoint = find_checkpoint(config, given, field)
    tokenizer = tokenizer_of(config, read_manifest(checkpoint))
    require_memory(config.model, 4, field, checkpoint)
    return from_checkpoint(config, checkpoint, tokenizer, device)


def _from_hugging_face(config: Config, folder: Path, device: torch.device, field: str) -> LoadedModel:
    if config.precision.fp8 is not None:
        raise UserError(
            "precision",
            config.precision.name,
            "weights of a Hugging Face folder are multiplied in bf16 or fp32",
            "take precision=bf16",
        )
    dtype = activation_dtype(config.precision)
    _, model_config, notes = open_model(folder, field, config.text_only)
    require_memory(model_config, dtype.itemsize, field, folder)
    if config.data.tokenizer is None:
        refuse_tiktoken(folder, field)
    if config.data.tokenizer is None and not (folder / "tokenizer.json").is_file():
        raise UserError(field, folder, "has no tokenizer.json", "set data.tokenizer to the tokenizer of these weights")
    choice = config.data.tokenizer or str(folder)
    tokenizer = load_tokenizer(choice)
    kernels = build_kernels(device.type, config.cluster.compiled)
    model_config, model, _ = load_hf_model(folder, dtype, field, kernels, config.text_only, config.adapter.path)
    check_fit(tokenizer, choice, model_config.vocab_size, fim_rate=0)
    decoder = Decoder(model.to(device), min(model_config.max_seq_len, model_config.yarn.original_seq_len))
    start_id = start_token(folder, tokenizer)
    return LoadedModel(decoder, tokenizer, model_config.max_seq_len, start_id, folder.name, folder, tuple(notes))


def start_token(folder: Path, tokenizer: Tokenizer) -> int:
    """Return the first token of every text: begin-of-text or eos."""
    path = folder / TOKENIZER_SETTINGS_FILE
    if not path.exists() or not read_json(path, FIELD, "download it again").get("add_bos_token"):
        return tokenizer.eos_id
    name = named_token(path, "bos_token", FIELD, "download it again")
    if name is None or (found := tokenizer.id_of(name)) is None:
        raise UserError(FIELD, path, f"its bos_token {name} is not in the tokenizer", "download both files again")
    return found
