"""Numbers as people read them."""

from __future__ import annotations

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def bytes_text(count: float) -> str:
    """Three digits and a decimal unit: 41.2 MB."""
    for unit, size in _UNITS:
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 999.5 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count:.0f} B"


def count_text(count: float) -> str:
    """Three digits and a short unit: 5.26 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def seconds_text(seconds: float) -> str:
    """Seconds with one decimal below a minute, else minutes and seconds, or hours and minutes."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def change_text(value: float, reference: float) -> str:
    """Signed difference in percent: +2.1 %."""
    percent = (value / reference - 1) * 100
    return "±0.0 %" if abs(percent) < 0.05 else f"{percent:+.1f} %".replace("-", "−")
