"""Sizes in bytes as they are typed."""

from __future__ import annotations

import re

from qwen3_tg.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def read_size(option: str, text: str, *, least: int = 1) -> int:
    """Bytes, of 24GB, 1.5 GiB or 512. Raises UsageError that names the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text, re.IGNORECASE)
    if not match or (nbytes := int(float(match[1]) * _UNITS[(match[2] or "").upper()])) < least:
        or_none = "" if least else ", or 0"
        raise UsageError(f"{option} must be a size such as 24GB or 24GiB{or_none}, found {text!r}")
    return nbytes
