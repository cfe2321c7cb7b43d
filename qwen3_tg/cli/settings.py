"""What can be changed between turns: how tokens are chosen, and how many.

The values live where the command line puts them, in the options; None is the checkpoint's advice.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from qwen3_tg.cli.generate import choose_sampling
from qwen3_tg.errors import Qwen3Error, UsageError, check_count
from qwen3_tg.llm import LLM
from qwen3_tg.sampling import Sampling

# Of each: whether it is an integer, and the values that it takes.
RANGES = {
    "temperature": (False, "at least 0"),
    "top_p": (False, "above 0 and at most 1"),
    "top_k": (True, "at least 0; 0 is all tokens"),
    "min_p": (False, "from 0 to 1"),
    "seed": (True, "from 0 to 2**128 - 1"),
    "repetition_penalty": (False, "above 0; 1 is none"),
    "presence_penalty": (False, "a number; 0 is none"),
    "frequency_penalty": (False, "a number; 0 is none"),
    "max_new_tokens": (True, "at least 1"),
    "thinking_budget": (True, "at least 0"),
}
DEFAULT = "default"


def change(options: argparse.Namespace, name: str, value: str) -> None:
    """Set one setting from what was typed; `default` is the checkpoint's advice again.

    Raises UsageError that names the range."""
    setattr(options, name, None if value == DEFAULT else _checked(name, _number(name, value)))


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that someone chose, thinking among them; to be kept in a file."""
    values = {name: getattr(options, name, None) for name in (*RANGES, "thinking")}
    return {name: value for name, value in values.items() if value is not None}


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings of a file that are unknown or out of range. Raises UsageError."""
    for name, value in settings.items():
        if name == "thinking":
            if value not in ("on", "off"):
                raise UsageError(f"thinking must be on or off, found {value!r}")
        elif name not in RANGES:
            raise UsageError(f"there is no setting {name!r}")
        else:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or (RANGES[name][0] and not isinstance(value, int)):
                raise UsageError(_wrong(name, value))
            _checked(name, value)


def table(options: argparse.Namespace, llm: LLM, seed: int) -> str:
    """All settings with the values in use and what they may be."""
    lengths = {name: getattr(options, name) for name in ("max_new_tokens", "thinking_budget")}
    used = vars(choose_sampling(options, llm)) | lengths | {"seed": seed}
    rows = []
    for name, (_, values) in RANGES.items():
        value = "-" if used[name] is None else str(used[name])
        rows.append(f"{name:<18} {value:<11} {values}")
    return "\n".join([*rows, f"/set NAME VALUE; {DEFAULT} is the model's own advice"])


def _number(name: str, text: str) -> float:
    if name not in RANGES:
        raise UsageError(f"there is no setting {name!r}; /set lists them")
    try:
        return int(text) if RANGES[name][0] else float(text)
    except ValueError:  # also an integer of too many digits
        raise UsageError(_wrong(name, text[:40])) from None


def _wrong(name: str, value: object) -> str:
    kind = "an integer" if RANGES[name][0] else "a number"
    return f"{name} must be {kind}, {RANGES[name][1].removeprefix('a number; ')}, found {value!r}"


def _checked(name: str, value: float) -> float:
    try:
        if name in ("max_new_tokens", "thinking_budget"):
            check_count(name, value, least=int(name == "max_new_tokens"))  # type: ignore[arg-type]
        else:
            Sampling(**{name: value})  # type: ignore[arg-type]
    except Qwen3Error as e:
        raise UsageError(str(e)) from None
    return value
