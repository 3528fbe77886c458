"""Keys that one mode alone reads: said to another, they would do nothing without a word."""

from collections.abc import Sequence

from conf.errors import UserError
from conf.schema import Mode

OWN_KEYS: dict[str, tuple[Mode, ...]] = {
    "dry_run": (Mode.dry_run,),
    "evaluate": (Mode.evaluate,),
    "export": (Mode.export,),
    "generate": (Mode.generate,),
    "plan.calibrate": (Mode.plan,),
    "plan.devices": (Mode.plan,),
    "plan.search": (Mode.plan,),
    "plan.tokens": (Mode.plan,),
    "plan.write": (Mode.plan,),
    "prove": (Mode.prove,),
}
"""A key, or a section of them, and the modes that read it."""


def refuse_keys_of_other_modes(mode: Mode, overrides: Sequence[str]) -> None:
    """Raise UserError for the first word of a command line that this mode would not read. A recipe may hold keys of every mode."""
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+")
        for own, modes in OWN_KEYS.items():
            if (key == own or key.startswith(f"{own}.")) and mode not in modes:
                rule = f"mode={mode.value} does not read it: {own} belongs to mode={modes[0].value}"
                raise UserError(key, value, rule, f"write mode={modes[0].value}, or leave {key} out")
