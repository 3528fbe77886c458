"""Rules of the sections hardware, plan and dry_run."""

import math
import re

from conf.errors import UserError
from conf.schema import Config, Hardware, Plan

FIGURES = (
    "memory_bytes",
    "bf16_flops",
    "fp8_flops",
    "price_per_hour",
    "watts",
)


def check_plan(config: Config) -> None:
    """Raise UserError for the first rule that one of the sections breaks."""
    _check_hardware(config.hardware)
    _check_plan(config.plan)
    _check_dry_run(config)


def _check_hardware(hardware: Hardware) -> None:
    if hardware.devices_per_node < 1:
        raise UserError("hardware.devices_per_node", hardware.devices_per_node, "must be 1 or more", "use 8")
    for name in FIGURES:
        value = getattr(hardware, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"hardware.{name}", value, "must be a number, not negative", "leave it out for not known")
    if re.fullmatch("[A-Z]{3}", hardware.currency) is None:
        raise UserError("hardware.currency", hardware.currency, "must be three capital letters (ISO 4217)", "use USD")
    if not 0 <= hardware.communication_share <= 1:
        raise UserError(
            "hardware.communication_share", hardware.communication_share, "is a share, 0 to 1", "use 0 for none"
        )
    for kind, rate in hardware.rates.items():
        for name, value in vars(rate).items():
            if not 0 <= value < math.inf:
                raise UserError(
                    f"hardware.rates.{kind}.{name}", value, "must be a number, not negative", "use 0 for no limit"
                )


def _check_plan(plan: Plan) -> None:
    if plan.devices < 0:
        raise UserError("plan.devices", plan.devices, "must not be negative", "use 0 for parallel.pp x parallel.dp")
    if plan.devices and not plan.search:
        raise UserError(
            "plan.devices", plan.devices, "is what a search fills", "add plan.search=true, or set parallel.pp and dp"
        )
    if plan.tokens is not None and not 0 < plan.tokens < math.inf:
        raise UserError(
            "plan.tokens", plan.tokens, "must be a number greater than 0", "use null for the recipe's own tokens"
        )
    if not 1 <= plan.imbalance < math.inf:
        raise UserError("plan.imbalance", plan.imbalance, "the busiest rank has at least the mean", "use 1 or more")
    if plan.write is not None and not plan.search:
        raise UserError("plan.write", plan.write, "writes the best layout of a search", "add plan.search=true")
    if plan.write is not None and re.fullmatch(r"[a-z]\w*", plan.write) is None:
        raise UserError(
            "plan.write", plan.write, "must be a plain name: lower-case letters, digits and _", "choose another name"
        )


def _check_dry_run(config: Config) -> None:
    dry_run, world = config.dry_run, config.parallel.pp * config.parallel.dp
    if dry_run.rank != "worst" and not (dry_run.rank.isdecimal() and int(dry_run.rank) < world):
        rule = f"must be worst or the number of a rank, 0 to {world - 1} = parallel.pp x parallel.dp - 1"
        raise UserError("dry_run.rank", dry_run.rank, rule, "use worst")
    if dry_run.steps < 1:
        raise UserError("dry_run.steps", dry_run.steps, "must be 1 or more", "use 3")
    if dry_run.shrink < 0:
        raise UserError("dry_run.shrink", dry_run.shrink, "must not be negative", "use 0, which chooses by itself")
