"""Logs to Weights & Biases in a separate thread, so that the training does not wait. After any error, the thread prints
one message and switches W&B off.

The W&B run is offline if the mode is `offline`, if there is no API key, or if the server does not answer. The
environment variable WANDB_MODE overrides the mode `auto`.

All attempts of a run folder log to one W&B run. A resumed attempt logs only steps after the step in wandb/last_step.
"""

import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from conf.errors import first_line
from conf.files import atomic_write_json, atomic_write_text, open_plain, read_plain
from conf.schema import ROOT, WandbMode
from conf.words import harmless, one_line
from train.checkpoint.run_folder import WANDB_PLACE, wandb_place
from train.metrics.names import LAYER_LOAD_EVERY, Record, is_event, is_layer_metric

# W&B also gets items: checkpoints, tables and alerts.
#
# An item is a function of the module wandb, the W&B run and the newest logged step. A table is logged under the next
# step, because W&B accepts only one row per step.

Item = Callable[[ModuleType, Any, int], None]

OVER_TOKENS = ("main_loss", "mtp_loss", "mtp_loss_*", "balance_loss")
"""Metrics that W&B plots against the number of trained tokens."""
WITH_MINIMUM = ("validation_loss", "validation_bits_per_byte")
"""More metrics that W&B plots against trained tokens. W&B's summary has their minimum and their last value."""
FILES = 1_000_000
"""Maximum number of a checkpoint's files that W&B lists."""
FIGURES = ("sequences", "tokens", "text_bytes", "loss", "perplexity", "bits_per_byte")


def define_metrics(run: Any) -> None:
    """Sets the x axis and the summary of metrics in W&B."""
    # W&B's summary has no `loss`, because the weights of this sum may change during a run.
    run.define_metric("loss", hidden=True, summary="none", step_metric="tokens")
    for name in OVER_TOKENS:
        run.define_metric(name, step_metric="tokens")
    for name in WITH_MINIMUM:
        run.define_metric(name, step_metric="tokens", summary="min,last")


def checkpoint(step: int, path: Path) -> Item:
    """Returns a function that logs names and sizes of a checkpoint's files."""

    def log(wandb: ModuleType, run: Any, _: int) -> None:
        about = {"step": step, "path": str(path), "host": socket.gethostname()}
        artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata=about)
        artifact.add_reference(path.absolute().as_uri(), checksum=False, max_objects=FILES)
        run.log_artifact(artifact, aliases=[path.name])

    return log


def sample_table(step: int, text: str) -> Item:
    """Returns a function that logs a generated text to a W&B table."""

    def log(wandb: ModuleType, run: Any, logged: int) -> None:
        run.log({"samples": wandb.Table(columns=["step", "text"], data=[[step, text]])}, step=logged + 1)

    return log


def evaluation_tables(found: dict[str, Any]) -> Item:
    """Returns a function that logs evaluate.json (`found`) as tables."""

    def log(wandb: ModuleType, run: Any, logged: int) -> None:
        head = [found["step"], found["checkpoint"], found["weights"]]
        rows = [[*head, row["name"], row["documents"], *(row[name] for name in FIGURES)] for row in found["sources"]]
        if len(rows) > 1:
            rows.append([*head, "together", "", *(found["total"][name] for name in FIGURES)])
        columns = ["step", "checkpoint", "weights", "source", "documents", *FIGURES]
        tables = {"evaluations": wandb.Table(columns=columns, data=rows)}
        for table, objects in (("positions", found["total"]["positions"]), ("needle", found["needle"])):
            if objects:
                data = [[found["step"], *each.values()] for each in objects]
                tables[f"evaluated_{table}"] = wandb.Table(columns=["step", *objects[0]], data=data)
        tasks = [[found["step"], task, *pair] for task, metrics in found["tasks"].items() for pair in metrics.items()]
        if tasks:
            tables["evaluated_tasks"] = wandb.Table(columns=["step", "task", "metric", "value"], data=tasks)
        run.log(tables, step=logged + 1)

    return log


def alert(title: str, text: str) -> Item:
    """Returns an item that sends a W&B alert."""

    def send(wandb: ModuleType, run: Any, _: int) -> None:
        run.alert(title=one_line(title), text=harmless(text), level=wandb.AlertLevel.WARN)

    return send


ONLINE_SECONDS = 10.0
"""Maximum seconds to wait for W&B's server when the run starts."""
FINISH_SECONDS = 60.0
"""Maximum seconds to wait for the upload of the last records."""
FLUSH_SECONDS = 1.0
"""Interval in seconds at which W&B writes records to its file."""
WAITING_RECORDS = 10_000
LAYER_SCALARS = ("layer_max_vio", "layer_entropy")
"""Metrics of each MoE layer that W&B gets."""
LOAD_BINS, LOAD_TOP = 40, 4.0
"""LOAD_BINS: number of bins of a load histogram. LOAD_TOP: upper end of the last bin, in multiples of the mean load."""


def wants_wandb(mode: WandbMode) -> bool:
    """Whether the run logs to W&B, online or offline."""
    return mode != WandbMode.disabled and not (mode == WandbMode.auto and os.environ.get("WANDB_MODE") == "disabled")


class WandbSink:
    """Logs records of steps, and items (checkpoints, tables and alerts), to the W&B run of a run folder.

    - config: settings that W&B shows, as plain values.
    - group: as in `place_at_wandb`.
    - note: called with one sentence if W&B goes offline or an error switches it off.
    - online_seconds: maximum seconds to wait for the server.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        name: str,
        config: Mapping[str, Any],
        mode: WandbMode,
        note: Callable[[str], None],
        group: str | None = None,
        commit: str | None = None,
        online_seconds: float = ONLINE_SECONDS,
    ):
        self._folder, self._note, self._online_seconds = run_folder, note, online_seconds
        self._arguments: dict[str, Any] = {
            "name": name,
            "config": dict(config),
            "dir": str(run_folder),
        }
        self._mode, self._commit, self._group = mode, commit, group
        self._queue: queue.Queue[Record | Item | None] = queue.Queue(WAITING_RECORDS)
        self._off = False
        self.where: str | None = None
        """Address or offline folder of the W&B run; None before start."""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, record: Record | Item) -> None:
        """Put a record or item into the thread's queue."""
        if self._off:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._switch_off(f"{WAITING_RECORDS} records are waiting, and W&B accepts none")

    def close(self) -> None:
        """Wait, with a limit, until W&B has written all records."""
        limit = self._online_seconds + FINISH_SECONDS
        try:
            self._queue.put(None, timeout=0 if self._off else limit)
        except queue.Full:
            self._switch_off("W&B accepts no more records")
        self._thread.join(limit)
        if self._thread.is_alive():
            self._switch_off("W&B did not finish before the time limit")

    def _switch_off(self, reason: str) -> None:
        if not self._off:
            self._off = True
            self._note(f"W&B is off for the rest of this run: {reason}. metrics.jsonl is still written.")

    def _work(self) -> None:
        try:
            self._log_all()
        except Exception as error:  # no exception may reach the training; the note reports it
            self._switch_off(f"{type(error).__name__}: {first_line(error)}")

    def _log_all(self) -> None:
        import wandb  # imported here, because it takes a second

        (self._folder / "wandb").mkdir(parents=True, exist_ok=True)
        run = self._start(wandb)
        define_metrics(run)
        last_step = self._folder / "wandb" / "last_step"
        last_step.touch()
        logged = int(read_plain(last_step) or 0)
        with open(last_step, "r+b", buffering=0, opener=open_plain) as file:
            while not self._off and (record := self._queue.get()) is not None:
                if callable(record):
                    self._do(record, wandb, run, logged)
                    continue
                if (resumed := record.get("resumed")) is not None:  # sent even if W&B has this step already
                    run.config.update({f"resumed_at_step_{resumed['step']}": resumed}, allow_val_change=True)
                if record["step"] > logged:
                    run.log(to_wandb(record), step=record["step"], commit=True)
                    logged = record["step"]
                    os.pwrite(
                        file.fileno(), b"%020d\n" % logged, 0
                    )  # one write of fixed width, so that a killed process cannot leave half a number
        run.finish()
        wandb.teardown()  # run.finish() alone would return before the last records are on disk

    def _do(self, item: Item, wandb: ModuleType, run: Any, logged: int) -> None:
        try:
            item(wandb, run, logged)
        except Exception as error:  # for example, the checkpoint was removed meanwhile; later records are still logged
            self._note(f"W&B gets no {item.__qualname__.partition('.')[0]}: {first_line(error)}")

    def _start(self, wandb: ModuleType) -> Any:
        settings = {
            "silent": True,
            "console": "off",
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
            "init_timeout": self._online_seconds,
            "finish_timeout": FINISH_SECONDS,
            "git_root": str(ROOT),  # otherwise W&B looks for a repository in the current folder
            "git_commit": self._commit,
            "disable_git": self._commit is None,
        }
        wandb.setup(wandb.Settings(silent=True))
        place = place_at_wandb(self._folder, self._group)
        atomic_write_json(self._folder / "wandb" / WANDB_PLACE, place)
        arguments = self._arguments | place | {"id": run_id(self._folder), "resume": "allow"}
        if goes_online(self._mode, wandb):
            try:
                run = wandb.init(**arguments, mode="online", settings=wandb.Settings(**settings))
            except Exception as error:
                self._note(f"W&B is offline, because the server did not create a run: {first_line(error)}")
                wandb.teardown()  # without this, W&B would treat the id as in use
                wandb.setup(wandb.Settings(silent=True))
            else:
                self.where = run.url
                return run
        run = wandb.init(**arguments, mode="offline", settings=wandb.Settings(**settings))
        self.where = str(Path(run.dir).parent)
        return run


def goes_online(mode: WandbMode, wandb: ModuleType) -> bool:
    """Whether the W&B run tries to be online."""
    if mode == WandbMode.offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return False
    return has_key(wandb)


def has_key(wandb: ModuleType) -> bool:
    """Whether this machine has an API key for the W&B server."""
    settings = wandb.setup().settings
    return bool(settings.api_key or settings.identity_token_file or has_netrc_key(settings.base_url))


def has_netrc_key(base_url: str) -> bool:
    """Whether `wandb login` has stored an API key for this server."""
    import netrc

    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def place_at_wandb(run_folder: Path, group: str | None = None) -> dict[str, str | None]:
    """Returns the project, entity and group of a run folder's W&B run. The first attempt reads them from the
    environment and stores them.

    group: the W&B group if WANDB_RUN_GROUP is not set.
    """
    return wandb_place(run_folder) or {
        "project": os.environ.get("WANDB_PROJECT", "sluice"),
        "entity": os.environ.get("WANDB_ENTITY"),
        "group": os.environ.get("WANDB_RUN_GROUP", group),
    }


def run_id(run_folder: Path) -> str:
    """Returns a run folder's W&B id. The first attempt creates it."""
    path = run_folder / "wandb" / "run_id"
    if not path.exists():
        atomic_write_text(path, secrets.token_hex(4) + "\n")
    return read_plain(path).decode().strip()


def to_wandb(record: Record) -> dict[str, Any]:
    """Converts a record for W&B: scalars, layer scalars, histograms."""
    import wandb

    scalars = (name for name in record if name != "step" and not is_layer_metric(name) and not is_event(name))
    data = {name: record[name] for name in scalars}
    for name in LAYER_SCALARS:
        for layer, value in record.get(name, {}).items():
            data[f"{name}/{layer_key(layer)}"] = value
    load = record.get("load") or {}
    if load:
        data["load"] = wandb.Histogram(np_histogram=load_histogram(load))
    if record["step"] % LAYER_LOAD_EVERY == 0:
        for layer, row in load.items():
            data[f"layer_load/{layer_key(layer)}"] = wandb.Histogram(np_histogram=load_histogram({layer: row}))
    return data


def layer_key(layer: str) -> str:
    """Returns a layer's name without dots, which W&B reads as nesting."""
    return layer.replace(".", "_")


def load_histogram(load: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the histogram of the tokens per expert in some layers: experts per bin, and bin edges in multiples of the
    mean."""
    counts_LE = np.array([np.asarray(row, np.float64) for row in load.values()])
    shares_LE = counts_LE / np.maximum(counts_LE.mean(axis=1, keepdims=True), 1e-9)
    return np.histogram(np.minimum(shares_LE, LOAD_TOP), bins=LOAD_BINS, range=(0.0, LOAD_TOP))
