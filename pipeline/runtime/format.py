"""Figures as people read them: numbers, sizes and times."""


def short_number(value: float) -> str:
    """Return a number with at most four digits: `1.5M`, `20k`, `0.25`, `3e-05`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"


def count_of(number: int, noun: str, spec: str = "") -> str:
    """Return a number with its noun, in the plural unless it is 1: `1 row`, `20 rows`.

    Args:
        spec: how the number is formatted, as after the colon of an f-string: `,` for `1,200 rows`.
    """
    return f"{number:{spec}} {noun}{'' if number == 1 else 's'}"


def are(number: int) -> str:
    """Return the verb of so many: `is` for 1, otherwise `are`."""
    return "is" if number == 1 else "are"


def decimal_size(num_bytes: float) -> str:
    """Return a size in decimal units, used for stored text and disks: `1.24 MB`."""
    text = short_number(num_bytes)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} {'byte' if num_bytes == 1 else 'bytes'}"


def binary_size(num_bytes: int) -> str:
    """Return a size in binary units, used for memory and files: `1.5 MiB`."""
    value, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024 and unit != "TiB":
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def clock_time(seconds: float, short: bool = False) -> str:
    """Return a time to the second as `1:02:03`; with `short`, below an hour as `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{minutes}:{rest:02}" if short and not hours else f"{hours:,}:{minutes:02}:{rest:02}"


def rough_time(seconds: float, longest: float | None = None) -> str:
    """Return a time as `71 s`, `12 min`, `3.5 h` or `2.1 d`.

    Args:
        longest: seconds that decide the unit, such as the end of an axis; default: `seconds` itself.
    """
    longest = seconds if longest is None else longest
    for limit, unit, name in ((172800.0, 86400, "d"), (7200.0, 3600, "h"), (300.0, 60, "min")):
        if longest >= limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
