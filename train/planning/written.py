"""How the figures of a plan are written, in a terminal and on a page: short, and with their unit."""

from typing import Any


def size(count: float) -> str:
    """61234567890 as 61.2 GB; a GB is 10⁹ bytes, as memory is sold."""
    scaled, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if abs(scaled) < 999.5:
            break
        scaled, unit = scaled / 1000, larger
    return f"{scaled:.0f} {unit}" if unit == "B" or scaled >= 100 else f"{scaled:.{1 if scaled >= 10 else 2}f} {unit}"


def duration(seconds: float) -> str:
    """12.31 as 12.3 s, 0.00213 as 2.13 ms."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit * 0.9995:
            return f"{_three(seconds / unit)} {name}"
    return f"{_three(seconds / 1e-6)} µs" if seconds else "0 s"


def long_time(days: float) -> str:
    """55.74 as 55.7 days; less than a day in hours, less than an hour in minutes or seconds."""
    for unit, name in ((1.0, "days"), (1 / 24, "h"), (1 / 1440, "min")):
        if days >= unit:
            return f"{days / unit:,.1f} {name}"
    return duration(days * 86400)


def amount(value: float) -> str:
    """671026419200 as 671B, 15360 as 15,360."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= unit * 0.9995:
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(part: float, whole: float = 1.0) -> str:
    """0.0512 as 5.1 %."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def figure(name: str, value: Any) -> str:
    """A number of `Plan.numbers()`, exactly where it is a count, with its unit where its name tells it."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if name in ("mfu", "bubble"):
        return share(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value >= 1e15:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def counted(number: int, what: str) -> str:
    """1 process, 1,024 processes."""
    several = f"{what}{'es' if what[-1] in 'sh' else 's'}"
    return f"{number:,} {what if number == 1 else several}"


def words(name: str) -> str:
    """peak_bytes_per_rank as "peak bytes per rank"."""
    return name.replace("_", " ")


def _three(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
