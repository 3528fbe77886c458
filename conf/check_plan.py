"""Rules of the sections hardware, plan and dry_run."""

import re

from conf.errors import UserError
from conf.schema import Config, Hardware, Plan


def check_plan(config: Config) -> None:
    """Raise UserError for the first rule that one of the sections breaks."""
    _check_hardware(config.hardware)
    _check_plan(config.plan)
    _check_dry_run(config)


def _check_hardware(hardware: Hardware) -> None:
    if re.fullmatch("[A-Z]{3}", hardware.currency) is None:
        raise UserError("hardware.currency", hardware.currency, "must be three capital letters (ISO 4217)", "use USD")


def _check_plan(plan: Plan) -> None:
    if plan.devices and not plan.search:
        raise UserError(
            "plan.devices", plan.devices, "is what a search fills", "add plan.search=true, or set parallel.pp and dp"
        )
    if plan.write is not None and not plan.search:
        raise UserError("plan.write", plan.write, "writes the best layout of a search", "add plan.search=true")
    if plan.write is not None and re.fullmatch(r"[a-z]\w*", plan.write) is None:
        raise UserError(
            "plan.write", plan.write, "must be a plain name: lower-case letters, digits and _", "choose another name"
        )


def _check_dry_run(config: Config) -> None:
    dry_run, world = config.dry_run, config.parallel.world
    if dry_run.rank != "worst" and not (dry_run.rank.isdecimal() and int(dry_run.rank) < world):
        rule = f"must be worst or the number of a rank, 0 to {world - 1} = parallel.pp x parallel.dp - 1"
        raise UserError("dry_run.rank", dry_run.rank, rule, "use worst")
