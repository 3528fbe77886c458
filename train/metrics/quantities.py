"""Formats sizes, times and amounts for people."""

import math

GIB = 2**30


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.0f} MiB"


def seconds(value: float) -> str:
    """Formats a time with three significant digits, in a suitable unit."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (600.0, 1.0, "s"), (36000.0, 1 / 60, "min")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value / 3600:.3g} h"


def amount(value: float) -> str:
    """Formats a count with a suffix: 1.54K, 2.66M, 14.8T."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def share(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.1f} %"


def error(planned: float, measured: float) -> str:
    """Formats the signed relative error of a planned value in percent; empty if `measured` is 0."""
    return f"{100 * (planned / measured - 1):+.1f} %" if measured else ""


def length_of_run(days: float) -> str:
    return f"{days:.1f} days" if days >= 2 else seconds(days * 86400)


def duration(seconds: float) -> str:
    """Formats a duration: 1:05, 2:03:04 or 3d 4h."""
    total = round(seconds)
    if total >= 172800:
        return f"{total // 86400}d {total % 86400 // 3600}h"
    hours, minutes = divmod(total // 60, 60)
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


def short(number: float) -> str:
    """Formats a number with suffix: 1234567 -> 1.23M."""
    if not math.isfinite(number):
        return str(number)
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
