"""Amounts of memory as people read and write them."""

from __future__ import annotations

import re

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def human(count: float) -> str:
    """Bytes for people: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_bytes(text: str) -> int:
    """24GB -> 24 * 10^9, 24GiB -> 24 * 2^30. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 1e9:
        raise ValueError(f"{text!r} is no amount of memory; write it as 24GB (10^9 bytes) or 24GiB (2^30)")
    return int(float(match[1]) * UNITS[match[2].upper()])
