"""YaRN: texts longer than those the model was trained on (Peng et al. 2023, arXiv:2309.00071).

What a checkpoint says of it, and which factor a wished context needs. What YaRN does to the angles
is in rope.py. Lengths are tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from qwen3_tg.errors import CheckpointError, UnsupportedError, UsageError

# Qwen trained and validated YaRN up to four times the original length (Qwen3's model cards).
LARGEST_FACTOR = 4.0
# The released models of April 2025 say 40,960, of which 32,768 is the trained length and the rest
# room for an answer; Qwen's own advice for YaRN counts from 32,768.
_TRAINED = {40960: 32768}
_LARGEST = sys.float_info.max
_KEYS = frozenset(
    "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale "
    "mscale_all_dim truncate".split()
)


@dataclass(frozen=True)
class Yarn:
    """`factor` is how many times longer texts may be than `original_max_position_embeddings`.

    `attention_factor` multiplies cosines and sines, and so sharpens attention by its square.
    Pairs that turn more than `beta_fast` times within the original length keep their speed, those
    that turn less than `beta_slow` times are slowed down by `factor`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @staticmethod
    def of(factor: float, original_max_position_embeddings: int) -> Yarn:
        """The usual form: attention factor 0.1 ln(factor) + 1 (equation 22 of the paper)."""
        return Yarn(factor, original_max_position_embeddings, _mscale(factor, 1.0))

    @property
    def longest(self) -> int:
        """The most positions it is meant for."""
        return round(self.factor * self.original_max_position_embeddings)

    def __str__(self) -> str:
        return f"YaRN factor {self.factor:g}, attention scaling {self.attention_factor:.4g}"


def read_rope(raw: Mapping[str, Any], where: str) -> tuple[float, Yarn | None]:
    """rope_theta and YaRN from the keys of transformers 5 (`rope_parameters`) or 4 (`rope_theta`,
    `rope_scaling`); any other rotation is refused."""
    theta, yarn = raw.get("rope_theta"), None
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {key} must be an object or null, found {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "yarn"):
            raise UnsupportedError(
                f"{where}: {key}: rope_type must be 'default' or 'yarn', found {kind!r}"
            )
        known = {"rope_type", "type", "rope_theta"} | (_KEYS if kind == "yarn" else set())
        if extra := sorted(set(rope) - known):
            raise UnsupportedError(f"{where}: {key}: unknown key(s) {', '.join(extra)}")
        if "rope_theta" in rope:
            theta = rope["rope_theta"]
        if kind == "yarn":
            yarn = _read_yarn(rope, raw, f"{where}: {key}")
    theta = 10_000.0 if theta is None else theta  # the default of transformers' Qwen3Config
    if not _is_number(theta) or not 0 < theta <= _LARGEST:
        raise CheckpointError(f"{where}: rope_theta must be a positive number, found {theta!r}")
    return float(theta), yarn


def _read_yarn(rope: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Yarn:
    """As transformers 5 reads it, where null means absent."""

    def number(key: str, default: float | None = None) -> float:
        value = rope.get(key)
        value = default if value is None else value
        if not _is_number(value) or not 0 < value <= _LARGEST:  # type: ignore[operator]
            raise CheckpointError(f"{where}: {key} must be a positive number, found {value!r}")
        return float(value)  # type: ignore[arg-type]

    original = rope.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
    if type(original) is not int or original < 1:
        raise CheckpointError(
            f"{where}: original_max_position_embeddings must be a positive integer, "
            f"found {original!r}"
        )
    factor = number("factor")
    if factor < 1:
        raise CheckpointError(f"{where}: factor must be at least 1, found {factor:g}")
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"{where}: truncate must be true or false, found {truncate!r}")
    default = _mscale(factor, 1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        default = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim"))
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=number("attention_factor", default),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=truncate,
    )
    if yarn.beta_fast < yarn.beta_slow:
        raise CheckpointError(
            f"{where}: beta_fast {yarn.beta_fast:g} must not be below beta_slow {yarn.beta_slow:g}"
        )
    return yarn


def for_context(
    max_position_embeddings: int, yarn: Yarn | None, context: int | None
) -> tuple[int, Yarn | None, str]:
    """The context, the YaRN it needs, and a remark for the user ("" for none).

    `context` None keeps what the checkpoint says. A wished context decides itself: no YaRN up to
    the native length, and beyond it the smallest factor that reaches. Raises UsageError with the
    reason for a context that the model cannot take."""
    original, native, most = _lengths(max_position_embeddings, yarn)
    if context is None:
        longest = max(max_position_embeddings, yarn.longest) if yarn else native
        return longest, yarn, f"{yarn}, set by the checkpoint; {_cost(native)}" if yarn else ""
    if not isinstance(context, Integral):
        raise UsageError(f"context must be an integer, found {context!r:.80}")
    if context not in range(1, most + 1):
        raise UsageError(
            f"context must be from 1 to {most} for this model, found {context}: it was trained on "
            f"{original} tokens, and YaRN is known to reach {most / original:g} times as far"
        )
    if context <= native:
        return (
            context,
            None,
            f"{yarn}, set by the checkpoint, is off: {context} tokens do not need it"
            if yarn
            else "",
        )
    chosen = Yarn.of(context / original, original)
    return context, chosen, f"{chosen}, for {context} tokens; {_cost(native)}"


def longest_context(max_position_embeddings: int, yarn: Yarn | None) -> int:
    """The most that can be wished for."""
    return _lengths(max_position_embeddings, yarn)[2]


def _lengths(max_position_embeddings: int, yarn: Yarn | None) -> tuple[int, int, int]:
    """Trained length, the most without YaRN, the most with it."""
    if yarn:
        original = native = yarn.original_max_position_embeddings
    else:
        native = max_position_embeddings
        original = _TRAINED.get(native, native)
    most = max(round(original * LARGEST_FACTOR), native, yarn.longest if yarn else 0)
    return original, native, most


def _cost(native: int) -> str:
    return (
        "it is static: short texts are stretched too, which costs quality there (one report: 26.5 "
        f"points instead of 39); a --context of at most {native} leaves it off"
    )


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
