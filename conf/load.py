"""Composes a checked Config from a command line, with Hydra.

Each folder in conf/ is a Hydra group: conf/conf contains the recipes, the others contain options. The program adds no
other folder, because groups in such a folder could hide keys of the same name.
"""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.adapters import ON_REQUEST
from conf.check import adapted_targets, check, notes_of_typed_keys
from conf.command_line import check_words, explain, refuse_keys_of_other_modes, settings_in
from conf.disk import disk_errors
from conf.errors import EXIT_OK, UserError
from conf.fields import check_fields
from conf.files import atomic_write_text, read_json
from conf.micro_batches import choose_micro_batch_size
from conf.optimizers import ADAMW, OPTIMIZERS, pretrained_with
from conf.own_code import OWN_CODE
from conf.removed_keys import drop_removed_keys
from conf.run_settings import LOOKS_AT_A_RUN, over_run_settings
from conf.schema import ROOT, Config, Hardware, HoldOutBy, Mode, OptimizerName
from conf.synonyms import INSTEAD_OF
from conf.words import say_folded, say_note
from conf.yaml_file import UNREADABLE, escaped, read_yaml, yaml_error

SPREADS = (Mode.train, Mode.plan, Mode.dry_run)
"""Modes that use the recipe's layout, and print each value chosen by the program."""
PLANNED = "h800"
"""The hardware of mode=plan if the user names none."""
COMPOSING = threading.Lock()
"""Lock for composition: each composition replaces and restores Hydra's global state."""


@dataclass
class _Primary(Config):
    """The schema with Hydra's default groups, and without Hydra's output files."""

    defaults: list[Any] = field(
        default_factory=lambda: [
            "_self_",
            {"model": "tiny"},
            {"data": "stdlib"},
            {"optim": "tiny"},
            {"adapter": "none"},
            {"parallel": "single"},
            {"precision": "bf16"},
            {"cluster": "local"},
            {"hardware": "none"},
            {"log": "default"},
            {"conf": "tiny"},
        ]
    )
    """Hydra's defaults list: later entries override earlier ones. `_following` moves the groups on the command line
    after the recipe."""
    hydra: Any = field(
        default_factory=lambda: {
            "output_subdir": None,
            "run": {"dir": "."},
            "sweep": {"dir": "${scratch:}", "subdir": "."},
            "job": {"name": "train", "chdir": False},
        }
    )


def to_config(node: DictConfig, said: Callable[[str], None] | None = None) -> Config:
    """Convert a composed node to a checked configuration. Raises UserError. said: called with a sentence about each
    chosen value."""
    if _takes_over(node):  # if a referenced value is a list or a mapping, OmegaConf does not check its type
        whole = OmegaConf.masked_copy(node, [key for key in node if key != "hydra"])
        node = cast(DictConfig, OmegaConf.merge(_schema(), escaped(OmegaConf.to_container(whole, resolve=True))))
    config = Config()
    for key, value in node.items():
        if key != "hydra":
            setattr(config, str(key), OmegaConf.to_object(value) if OmegaConf.is_config(value) else value)
    check_fields(config)
    choices = list(_choose(config))
    check(config)
    if said is not None:
        for choice in choices:
            said(choice)
    return config


def _takes_over(node: DictConfig) -> bool:
    """Whether a setting refers to another one, as in `${KEY}`. The default of data.cache does not count."""
    keys, place = [str(key) for key in node if key != "hydra"], Config().data.cache
    return any(OmegaConf.is_interpolation(node, key) or "${" in str(node[key]).replace(place, "") for key in keys)


@cache
def _schema() -> DictConfig:
    """Return the schema, cached because a merge copies it."""
    return OmegaConf.structured(Config)


def _choose(config: Config) -> Iterator[str]:
    """Set the keys that the recipe leaves null. Yield a sentence about each choice for the user."""
    if config.optim.name is None:
        config.optim.name, why = _choose_optimizer(config)
        if why:
            yield f"optim.name={config.optim.name} was chosen: {why}"
    if config.adapter.on and config.adapter.targets is None:
        config.adapter.targets = [target for target in adapted_targets(config.model) if target not in ON_REQUEST]
    if config.data.hold_out_by is None:
        config.data.hold_out_by = _choose_hold_out(config)
    if config.micro_batch_size is None:
        config.micro_batch_size = size = choose_micro_batch_size(config)
        count = config.batch_size // (size * config.parallel.dp)
        shared = config.parallel.stage_ranks
        what = "data-parallel ranks" if config.parallel.cp == 1 else "ranks of a stage"
        ranks = f" on each of {shared} {what}" if shared > 1 else ""
        yield (
            f"micro_batch_size={size} is chosen: a step is {count} micro-batch{'es' * (count > 1)} of "
            f"{size * config.seq_len // config.parallel.cp} tokens{ranks}"
        )
    if config.mode == Mode.plan and config.hardware.name is None:
        described = read_yaml(ROOT / "conf" / "hardware" / f"{PLANNED}.yaml")
        usual = vars(Hardware())
        given = {key: value for key, value in vars(config.hardware).items() if value != usual[key]}
        hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Hardware), described, given))
        assert isinstance(hardware, Hardware)
        config.hardware = hardware
        yield f"hardware= is not set: the plan is for {PLANNED}, the GPUs of the paper"


def _choose_optimizer(config: Config) -> tuple[OptimizerName, str]:
    """Return the optimizer, and the reason for an unusual choice.

    Adapters use AdamW. An existing run keeps its optimizer. A new run takes the optimizer that pretrained its initial
    weights, if this optimizer is known.
    """
    own = Path(config.runs, config.name, "config.yaml")
    if config.adapter.on:
        return OptimizerName[ADAMW], ""
    if config.init_from is None or own.is_file():
        found = _setting_of(own, "optim.name")
        return OptimizerName[found if found in OPTIMIZERS else ADAMW], ""
    known = None
    with contextlib.suppress(UserError):  # other code reports an unreadable folder
        known = pretrained_with(read_json(Path(config.init_from).expanduser() / "config.json", "init_from", ""))
    if known is None:
        return OptimizerName[ADAMW], ""
    return OptimizerName[known[1]], f"{known[0]} has the shape of {config.init_from}, and was pretrained with it"


def _choose_hold_out(config: Config) -> HoldOutBy:
    """Return data.hold_out_by of the existing run, or of the run that resume or init_from names. With another value,
    validation would use training documents."""
    folders = [Path(config.runs, config.name)]
    for given in (config.resume, config.init_from):
        folder = Path(given or "").expanduser()
        folders += [folder.absolute().parents[1]] if (folder / "manifest.json").is_file() else [folder] * bool(given)
    run = next((one / "config.yaml" for one in folders if (one / "config.yaml").is_file()), None)
    if run is None or _setting_of(run, "data") is None:  # a damaged file does not tell that an earlier version wrote it
        return HoldOutBy.content
    return HoldOutBy(_setting_of(run, "data.hold_out_by") or HoldOutBy.name)


def _setting_of(run: Path, key: str) -> Any:
    """Return the value of a key in a config.yaml, or None."""
    with contextlib.suppress(UserError, OmegaConfBaseException):
        return OmegaConf.select(read_yaml(run), key) if run.is_file() else None
    return None


def read_config(path: str) -> Config:
    """Return the configuration of a run folder. Raises UserError for an invalid file, or for a resolver such as
    ${oc.env:HOME} in it."""
    node = OmegaConf.merge(_schema(), read_yaml(Path(path)))
    assert isinstance(node, DictConfig)
    return to_config(node)


def write_config(config: Config, path: str) -> None:
    """Write all resolved settings atomically, so that a rank needs no Hydra."""
    atomic_write_text(Path(path), OmegaConf.to_yaml(OmegaConf.create(escaped(asdict(config)))))


def compose(*overrides: str) -> Config:
    """Return the checked configuration for these arguments. Raises UserError."""
    overrides = tuple(map(_reworded, overrides))
    with explained(overrides):
        return to_config(_composed(overrides))


def compose_node(*overrides: str) -> DictConfig:
    """Return the composed settings, including Hydra's settings, before interpolation and checks."""
    with COMPOSING, hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3", job_name="train"):
        register()
        node = hydra.compose("train", [_reworded(word) for word in overrides], return_hydra_config=True)
    if node.name is None:
        node.name = node.hydra.runtime.choices.conf
    return node


@contextmanager
def explained(words: Sequence[str]) -> Iterator[None]:
    """Context manager that converts errors of Hydra and OmegaConf about the arguments `words` to UserError."""
    check_words(words)
    try:
        yield
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, AssertionError, ValueError, TypeError) as error:
        raise explain(error, words) from error


def _reworded(word: str) -> str:
    """Return the argument in the form that Hydra needs.

    - `name=[a,b]`, several runs for mode=report, becomes text.
    - `optim=muon` becomes optim.name=muon, because the files of the group optim are schedules, not optimizers.
    - `conf=NAME.yaml` becomes conf=NAME.
    """
    key, _, value = word.partition("=")
    if key == "conf" and "/" not in value:
        return word.removesuffix(".yaml")
    if key == "optim" and value in OPTIMIZERS:
        return f"optim.name={value}"
    return f'name="{value}"' if key == "name" and value.startswith("[") and value.endswith("]") else word


def _following(load: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Wrap Hydra's composition, so that groups on the command line override the recipe."""

    @wraps(load)
    def load_typed(
        loader: ConfigLoaderImpl, config_name: str, overrides: list[str], run_mode: RunMode, **more: bool
    ) -> DictConfig:
        settings = [word.lstrip("+").partition("=") for word in overrides if run_mode is RunMode.RUN]
        typed = {key for key, _, value in settings if key != "conf" and not value.startswith("{")}
        defaults = sorted(_Primary().defaults, key=lambda one: isinstance(one, dict) and not typed.isdisjoint(one))
        quiet = [{f"override hydra/{name}": "none"} for name in ("job_logging", "hydra_logging")]
        ConfigStore.instance().repo["train.yaml"].node.defaults = [*defaults, *quiet]
        node = load(loader, config_name, overrides, run_mode, **more)
        _empty_beside_typed(node, overrides)
        return node

    return load_typed


def _empty_beside_typed(node: DictConfig, words: Sequence[str]) -> None:
    """Clear the recipe's keys that would disable a typed key, as `epochs` disables `steps`. Raises UserError if both
    are typed."""
    settings = {
        key: value for key, _, value in (word.lstrip("+").partition("=") for word in words)
    }  # if a key is typed twice, the last value is used
    given = [key for key, value in settings.items() if value.lower() not in ("", "null", "[]")]
    # A typed key inside a dictionary such as data.source counts as the typed dictionary. A typed key inside the group
    # `data` does not count as `data`.
    inside = [key for key in given if "." in key]
    typed = [
        name
        for name in INSTEAD_OF
        if name in given or ("." in name and any(key.startswith(f"{name}.") for key in inside))
    ]
    for key in typed:
        for other in INSTEAD_OF[key]:
            if other in typed and key != "data":  # data is a group, and typed keys override its values
                raise UserError(f"{key} and {other}", "", "exclude each other", f"leave {key} or {other} out")
            if other not in typed and OmegaConf.select(node, other):
                OmegaConf.update(node, other, [] if other == "data.mix" else None)


class RecipeFiles(FileConfigSource):
    """Hydra's reader of recipe files, which drops removed keys."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file. Raises UserError for a removed key with another value."""
        found = super().load_config(config_path)
        package = found.header["package"] or config_path.rpartition("/")[0].replace("/", ".")
        plain = OmegaConf.to_container(found.config)
        file = str(Path(self.path, f"{config_path.removesuffix('.yaml')}.yaml"))
        package = "" if package == "_global_" else package
        if isinstance(plain, dict) and drop_removed_keys(plain, file, package, by_run=False):
            found.config = OmegaConf.create(plain)
        return found


@cache
def register() -> None:
    """Register the schema and `${is_set:${KEY}}` (true unless the key is null) once per process."""
    OmegaConf.register_new_resolver("is_set", lambda value: value is not None, replace=True)
    schema = OmegaConf.structured(_Primary)
    for key in (*OWN_CODE, "data.template_keys"):
        section, _, name = key.rpartition(".")
        place = OmegaConf.select(schema, section) if section else schema
        OmegaConf.set_struct(
            place._get_node(name), False
        )  # keys of user code and of a template are not keys of the schema
    ConfigStore.instance().store(name="train", node=schema)
    Plugins.instance()  # otherwise Plugins, when it is first used, would replace RecipeFiles by its own reader
    SourcesRegistry.instance().types["file"] = RecipeFiles
    ConfigLoaderImpl.load_configuration = _following(ConfigLoaderImpl.load_configuration)


def run(job: Callable[[list[Config]], int]) -> int:
    """Compose and check the configuration in sys.argv, and return the exit code of `job`. With -m, `job` gets one
    configuration per combination."""
    words = sys.argv[1:] = [_reworded(word) for word in sys.argv[1:]]
    # With this variable, Hydra raises errors instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        settings = settings_in(words)  # Hydra accepts no flags between settings
        sys.argv[1:] = [*(word for word in words if word not in settings), *settings]
        plain = not any(word.startswith("-") or word.lstrip("+~").startswith("hydra") for word in words)
        try:
            with explained(words):
                nodes = [_composed(words)] if plain else _composed_by_hydra()
        except UserError:
            raise
        except UNREADABLE as error:
            raise yaml_error(error) from error
        for node in nodes:
            refuse_keys_of_other_modes(node.mode, words)
        configs = [to_config(node, _say if node.mode in SPREADS else None) for node in nodes]
        typed = {word.lstrip("+").partition("=")[0] for word in settings}
        for note in dict.fromkeys(
            note for config in configs if config.mode in SPREADS for note in notes_of_typed_keys(config, typed)
        ):
            _say(note)
        with disk_errors(*configs):
            return job(configs) if configs else EXIT_OK
    except UserError as error:
        return report(error)
    except (HydraException, OmegaConfBaseException) as error:
        return report(explain(error, words))


def _composed(words: Sequence[str]) -> DictConfig:
    """Return the settings of one run, composed once; Hydra's entry point composes twice."""
    node = compose_node(*words)
    return over_run_settings(node, list(words), list(node.hydra.runtime.choices))


def _composed_by_hydra() -> list[DictConfig]:
    """Return the settings of every job in sys.argv; empty if Hydra only prints output."""
    register()
    nodes: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
    def collect(node: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        if node.name is None:
            node.name = hydra_config.runtime.choices["conf"]
        if hydra_config.mode == RunMode.MULTIRUN and node.mode not in (*LOOKS_AT_A_RUN, Mode.report):
            # Each job of a sweep has its own run folder.
            node.name = f"{node.name}/{hydra_config.job.num}"
        nodes.append(over_run_settings(node, hydra_config.overrides.task, list(hydra_config.runtime.choices)))

    with tempfile.TemporaryDirectory() as scratch:  # Hydra writes its own files of a sweep there
        OmegaConf.register_new_resolver("scratch", lambda: scratch, replace=True)
        collect()
    return nodes


def _say(choice: str) -> None:
    """Print a note, under torchrun only on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        say_note(choice)


def reported(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a command: print a UserError, and return its exit code."""

    @wraps(main)
    def run_main(*arguments: Any) -> int:
        try:
            return main(*arguments)
        except UserError as error:
            return report(error)

    return run_main


def report(error: UserError) -> int:
    """Print the error on one screen. Returns its exit code."""
    say_folded(f"error: {error}", 8, sys.stderr)
    return error.code
