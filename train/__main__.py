"""`sluice [conf=RECIPE] [group=option] [key=value]`, or `python -m train`: composes and checks settings, then runs
`mode`."""

import gc
import importlib
import os
import pkgutil
import re
import signal
import sys

IS_COMMAND = __name__ == "__main__" or os.path.basename(sys.argv[0]) == "sluice"
"""Whether this process runs the command `sluice`."""
COMMAND_MODULES = {"doctor": "doctor", "runs": "runs", "launch": "job_file", "why": "why", "top": "top"}
"""The module in train/command of each command. --help prints its docstring."""
if IS_COMMAND:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until a handler is set, so that Ctrl-C during an import shows no traceback

from pathlib import Path  # noqa: E402
from types import TracebackType  # noqa: E402

from train.program import environment_of_children, guard_names, require_linux, require_packages  # noqa: E402

require_linux()
if __name__ == "__main__":
    guard_names()  # before imports of packages that files in the working folder may hide
    require_packages()

from cluster.interrupts import Interrupts  # noqa: E402

INTERRUPTS = Interrupts() if IS_COMMAND else None

from train.kernels.cpu.processor import tune_cpu, tune_gpu  # noqa: E402

tune_cpu()  # before torch allocates anything
tune_gpu()  # before CUDA starts

from cluster.interrupts import leave  # noqa: E402
from cluster.launch import launch  # noqa: E402
from cluster.place import Place, given_place, is_driver  # noqa: E402
from conf.disk import let_output_be_lost  # noqa: E402
from conf.errors import EXIT_CRASH, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED, EXIT_USER, UserError  # noqa: E402
from conf.load import run  # noqa: E402
from conf.own_code import targets_of  # noqa: E402
from conf.schema import Config, Mode  # noqa: E402
from conf.screen import Terminal  # noqa: E402
from conf.words import say, say_note  # noqa: E402
from train.loop.layout_check import check_layout  # noqa: E402
from train.model.count import checkpoint_bytes  # noqa: E402

MODE_FUNCTIONS = {
    Mode.report: "train.show.compare:print_reports",
    Mode.export: "train.export.run:export",
    Mode.average: "train.checkpoint.average:write_average",
    Mode.evaluate: "train.evaluate.run:evaluate",
    Mode.generate: "train.generate.command:generate",
    Mode.score: "train.score.run:score",
    Mode.dashboard: "train.show.dashboard:build_dashboard",
    Mode.plan: "train.plan.run:run_plan",
    Mode.dry_run: "train.dry_run.run:dry_run",
    Mode.prove: "train.prove.run:prove",
    Mode.show_data: "train.data.show_data:show_data",
}
"""The function of each mode, as module:function. It returns the exit code."""
STARTS_RANKS = (Mode.evaluate, Mode.prove)
"""Modes whose function has a second argument, `alone`; see `do`."""


def main(configs: list[Config]) -> int:
    """Run one job, or a sweep. Returns the worst exit code."""
    codes: list[int] = []
    try:
        for config in configs:
            codes.append(do(config, alone=len(configs) == 1))
            if codes[-1] in (
                EXIT_STOPPED,
                EXIT_INTERRUPTED,
            ):  # a signal stops all jobs of the command
                if left := len(configs) - len(codes):
                    say(f"stopped: {left} of {len(configs)} jobs of the sweep were not started", file=sys.stderr)
                break
    except UserError as error:
        codes.append(error.code)
        raise
    finally:
        if len(configs) > 1 and configs[0].mode is Mode.train and is_driver():
            from train.show.compare import sweep_screen

            sweep_screen(configs, codes)
    return max(codes)


def do(config: Config, alone: bool) -> int:
    """Run the job's `mode`. Returns the exit code. alone: whether this is the command's only job.

    If it is, this process may become a rank.
    """
    try:
        if config.mode is Mode.train:
            return _train(config, alone)
        work = pkgutil.resolve_name(MODE_FUNCTIONS[config.mode])
        return work(config, alone) if config.mode in STARTS_RANKS else work(config)
    except KeyboardInterrupt:
        goes_on = config.mode is Mode.train
        say(f"stopped by Ctrl-C{'; the same command resumes' if goes_on else ''}", file=sys.stderr)
        return EXIT_STOPPED if goes_on else EXIT_INTERRUPTED


def _train(config: Config, alone: bool) -> int:
    """Train a run. Returns the exit code. alone: see `do`."""
    from train.checkpoint.run_folder import RunFolder
    from train.metrics.origin import record_start
    from train.show.writer import tell_of_end

    if config.epochs is not None:
        from train.data.prepare import with_steps  # reads the data

        config = with_steps(config)
    if not is_driver():
        return launch(config, Path(config.runs) / config.name, [], _run_rank)
    check_before_start(config)
    with RunFolder(config, checkpoint_bytes(config)) as folder:
        record_start(folder.path)
        command = [sys.executable, "-m", "train.worker", str(folder.config_path)]
        planner = [sys.executable, "-m", "train.plan.smaller_layouts", str(folder.config_path)]
        code = launch(config, folder.path, command, _run_rank, alone, planner, watched=True)
        if code == EXIT_USER:
            folder.take_back()
        elif code in (EXIT_CRASH, EXIT_DIVERGED):
            tell_of_end(config, folder.path, code)
        return code


def check_before_start(config: Config) -> None:
    """Run all checks of a start, the quickest first. Raises UserError before anything is written."""
    from train.checkpoint.run_folder import check_space, resume_point
    from train.checkpoint.trained_with import describe_base, refuse_mean, require_adapter, require_base, require_model
    from train.data.corpus import build_corpus
    from train.data.prepare_progress import show_progress
    from train.data.tokenizer import warn_of_spare_rows
    from train.kernels.deterministic import check_settings
    from train.kernels.device import check_memory
    from train.kernels.gpu_check import check_gpu

    check_layout(config)
    if given_place() is not None:
        # Another program started the ranks. They would time out during slow checks.
        return
    check_space(config, checkpoint_bytes(config))
    check_memory(config, checkpoint_bytes(config))
    check_gpu(config)
    if config.cluster.deterministic:
        check_settings()
    if targets_of(config):
        from train.own_parts import check_own_code  # imports torch

        check_own_code(config)
    start = resume_point(config).manifest
    if start is not None:
        require_model(config, start.folder, start.meta)
        refuse_mean(config, start.folder, start.meta)
        require_adapter(config, start.folder, start.meta)
    with show_progress() as progress:
        corpus = build_corpus(config, progress)
    if warning := warn_of_spare_rows(corpus.tokenizer, config.model.vocab_size):
        say_note(warning)
    if config.init_from is not None and (start is None or config.adapter.on):
        from train.loop.start import check_start, own_start

        source = own_start(config, corpus.tokenizer) or check_start(config, corpus.tokenizer)[0]
        if start is not None:
            require_base(config, start.folder, start.meta, describe_base(source))


def _run_rank(config: Config, place: Place) -> int:
    gc.disable()  # garbage collection would take a sixth of the import time
    from train.worker import run_rank  # imports torch, which the driver of other ranks does not need

    gc.enable()
    return run_rank(config, place)


def _plan_of_job(config: Config) -> tuple[str, float, float]:
    """Plans a run. Returns a summary line, hours, and the largest host bytes of a node."""
    from train.plan.budget import make_plan

    plan = make_plan(config)
    hours = 24 * plan.budget.days
    line = (
        f"mode=plan: {plan.verdict}, {plan.step.step_seconds:.3g} s a step, {hours:.3g} hours for {config.steps} steps"
    )
    return line, hours, float(plan.host_bytes)


def _show_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception, with escapes for invisible characters."""
    import traceback

    say("".join(traceback.format_exception(kind, error, trace)).rstrip(), file=sys.stderr)


def command() -> int:
    """Run the command `sluice`. Returns the exit code."""
    os.environ |= environment_of_children()
    sys.excepthook = _show_bug
    let_output_be_lost()
    if INTERRUPTS is None:
        return _command(sys.argv[1:])
    with INTERRUPTS:
        INTERRUPTS.code = _command(sys.argv[1:])
    return INTERRUPTS.code


def _command(words: list[str]) -> int:
    first, *rest = words or [""]
    if first == "--version":
        from train.command.doctor import version_line

        say(version_line())
        return EXIT_OK
    asks = bool({"--help", "-h"} & set(words))
    if first in COMMAND_MODULES:
        module = importlib.import_module(f"train.command.{COMMAND_MODULES[first]}")
        if asks:
            Terminal().print(re.sub(r"(?<!\n)\n(?![\n`])", " ", (module.__doc__ or "").strip()))
            return EXIT_OK
        return module.main(rest, _plan_of_job) if first == "launch" else module.main(rest)
    if asks:
        from conf.help import show_help

        return show_help(words)
    return run(main)


def command_alone() -> int:
    """Run the command, and end the process; see `leave`."""
    return leave(command())


if __name__ == "__main__":
    sys.exit(command_alone())
