"""Applies the settings of an existing run in modes that read a run.

    python -m train mode=evaluate name=mine data.path=OTHER

Settings such as model, precision, seq_len and tokenizer come from the run's config.yaml. The command line overrides
them, and alone sets the layout (parallel, cluster). If the user types conf=RECIPE, the run's settings are not used.

A config.yaml may read data of this machine (conf/yaml_file.py) or name code (conf/own_code.py) only with trust=true.
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import UserError
from conf.own_code import READ_FROM_RUNS
from conf.schema import Config, HoldOutBy, Mode
from conf.yaml_file import escaped, read_yaml

LOOKS_AT_A_RUN = (Mode.export, Mode.evaluate, Mode.generate, Mode.score, Mode.dashboard)
SOURCES = ("path", "mix", "format", "text_key", "source")
"""Keys of section data that locate the documents. If the user types one of them, the run's values of all of them are
ignored."""


def over_run_settings(node: DictConfig, overrides: Sequence[str], groups: Sequence[str]) -> DictConfig:
    """Return the settings of the existing run, overridden by the command line. If there is no run to read, return
    `node` unchanged.

    node: composed configuration. overrides: KEY=VALUE arguments. groups: names of Hydra's groups.
    """
    keys = [override.partition("=")[0].lstrip("+~") for override in overrides]
    if node.mode not in LOOKS_AT_A_RUN or "conf" in keys:
        return node
    file = next((folder / "config.yaml" for folder in _folders(node) if (folder / "config.yaml").is_file()), None)
    if file is None:
        return node
    try:
        settings = OmegaConf.merge(OmegaConf.structured(Config), read_yaml(file, trust=node.trust))
    except OmegaConfBaseException as error:
        rule = f"has settings that this version does not support: {str(error).splitlines()[0]}"
        cure = "use the version that trained the run, or correct the file"
        raise UserError(file.name, file, rule, cure) from error
    if settings.data.hold_out_by is None:  # an earlier version without this key wrote the run
        settings.data.hold_out_by = HoldOutBy.name
    if (file.parent / "tokenizer.json").is_file():  # the path in the settings may not exist on this machine
        settings.data.tokenizer = escaped(str(file.parent))
    if any(key.startswith("data.") and key.split(".")[1] in SOURCES for key in keys):
        keys += [f"data.{name}" for name in SOURCES]
    for key in ["parallel", "cluster", "runs", "trust", *(key for key in keys if key in groups), *keys]:
        OmegaConf.update(settings, key, escaped(OmegaConf.select(node, key)), merge=False)
    tasks = settings.evaluate.task_path
    if node.mode == Mode.evaluate and tasks is not None and not node.trust and "evaluate.task_path" not in keys:
        rule = f"is set in {file}; task definitions can contain code, which would run"
        cure = "type evaluate.task_path=FOLDER (null for none), or set trust=true, if you trust the author of the file"
        raise UserError("evaluate.task_path", tasks, rule, cure)
    for key, modes in READ_FROM_RUNS.items():
        typed = {key, f"{key}._target_", key.partition(".")[0]} & {*keys}
        section = OmegaConf.select(settings, key)
        if key == "data.template_function" and node.mode == Mode.generate and not node.generate.chat:
            continue  # plain text needs no template
        if node.mode in modes and section and not node.trust and not typed:
            rule = f"is set in {file}, and its import would run code with your rights"
            cure = f"set trust=true, if you trust the author of the file, or use your own recipe (conf=NAME), or set {key}=null"
            raise UserError(f"{key}._target_", section.get("_target_"), rule, cure)
    if "micro_batch_size" not in keys and settings.micro_batch_size:
        share, rest = divmod(settings.batch_size, settings.parallel.dp)
        if rest or share % settings.micro_batch_size or "seq_len" in keys:
            settings.micro_batch_size = None  # the run chose it for another layout or sequence length
    assert isinstance(settings, DictConfig)
    return settings


def _folders(node: DictConfig) -> list[Path]:
    """Return the folders that may contain the run's config.yaml: the run folder or, if the user names a checkpoint,
    this checkpoint and the two folders above it."""
    sections = {mode: node[mode.value] for mode in (Mode.export, Mode.evaluate, Mode.generate, Mode.score)}
    named = sections[node.mode].checkpoint if node.mode in sections else None
    if named is None:
        return [Path(node.runs) / node.name]
    checkpoint = Path(named).absolute()
    return [checkpoint, *checkpoint.parents[:2]]
