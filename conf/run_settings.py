"""Modes that look at an earlier run take its settings, so that nobody has to repeat them.

    python -m train mode=evaluate name=mine data.path=OTHER

What the run was (model, precision, seq_len, tokenizer, ...) comes from its config.yaml; what the command line says goes
over it; how to spread the work now (parallel, cluster) comes from the command line alone, as it is another job. With an
explicit conf=RECIPE, or where there is no run, the composed configuration is taken as it is.

The run may be somebody else's. Only with trust=true may its config.yaml read this machine (conf/yaml_file.py) or name code to be run
(conf/own_code.py).
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
"""Fields of data that say where documents come from. They change together, as path, mix and source exclude each other."""


def over_run_settings(node: DictConfig, overrides: Sequence[str], groups: Sequence[str]) -> DictConfig:
    """The composed node, over the settings of the run that it looks at if its mode is such a one.

    overrides: the command line, KEY=VALUE each; groups: names of Hydra's groups.
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
        rule = f"holds what this version does not know: {str(error).splitlines()[0]}"
        cure = "use the version that trained the run, or correct the file"
        raise UserError(file.name, file, rule, cure) from error
    if settings.data.hold_out_by is None:  # an earlier version's, which had no such key
        settings.data.hold_out_by = HoldOutBy.name
    if (file.parent / "tokenizer.json").is_file():  # the path in the settings may mean nothing here
        settings.data.tokenizer = escaped(str(file.parent))
    if any(key.startswith("data.") and key.split(".")[1] in SOURCES for key in keys):
        keys += [f"data.{name}" for name in SOURCES]
    for key in ["parallel", "cluster", "runs", "trust", *(key for key in keys if key in groups), *keys]:
        OmegaConf.update(settings, key, escaped(OmegaConf.select(node, key)), merge=False)
    tasks = settings.evaluate.task_path
    if node.mode == Mode.evaluate and tasks is not None and not node.trust and "evaluate.task_path" not in keys:
        rule = f"stands in {file}, and definitions of tasks can hold code, which would run"
        cure = "type evaluate.task_path=FOLDER (null for none), or set trust=true, if you trust who wrote the file"
        raise UserError("evaluate.task_path", tasks, rule, cure)
    for key, modes in READ_FROM_RUNS.items():
        typed = {key, f"{key}._target_", key.partition(".")[0]} & {*keys}
        section = OmegaConf.select(settings, key)
        if key == "data.template_function" and node.mode == Mode.generate and not node.generate.chat:
            continue  # texts need none
        if node.mode in modes and section and not node.trust and not typed:
            rule = f"stands in {file}, and would be imported: code that runs as you"
            cure = f"set trust=true, if you trust who wrote the file, or give your own recipe: conf=NAME, or {key}=null for none"
            raise UserError(f"{key}._target_", section.get("_target_"), rule, cure)
    if "micro_batch_size" not in keys and settings.micro_batch_size:
        share, rest = divmod(settings.batch_size, settings.parallel.dp)
        if rest or share % settings.micro_batch_size or "seq_len" in keys:
            settings.micro_batch_size = None  # it was chosen for the layout and the sequences of the training
    assert isinstance(settings, DictConfig)
    return settings


def _folders(node: DictConfig) -> list[Path]:
    """Where the run's folder may be: around the checkpoint that is named, else by the run's name."""
    sections = {mode: node[mode.value] for mode in (Mode.export, Mode.evaluate, Mode.generate, Mode.score)}
    named = sections[node.mode].checkpoint if node.mode in sections else None
    if named is None:
        return [Path(node.runs) / node.name]
    checkpoint = Path(named).absolute()
    return [checkpoint, *checkpoint.parents[:2]]
