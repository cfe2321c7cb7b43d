"""How well a model foretells a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from qwen3_tg.errors import UsageError

_ROWS_AT_ONCE = 64  # a row of float64 logits of Qwen3 has 1.2 MB


class HasLogits(Protocol):
    """What is measured: `qwen3_tg.LLM` is one."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`: (S, V)."""


def perplexity(llm: HasLogits, ids: Sequence[int], window: int) -> float:
    """exp of the mean of -log p(id | the ids before it in its window), natural logarithm.

    Windows of `window` ids do not overlap; the first id of each is foretold by nothing and not
    counted. Raises UsageError for a text of fewer than two ids or a window below two."""
    if window < 2 or len(ids) < 2:
        raise UsageError(
            f"perplexity needs a text of at least two tokens in windows of at least two, found "
            f"{len(ids)} in windows of {window}"
        )
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part = list(ids[start : start + window])
        logits = llm.logits(part)
        for row in range(0, len(part) - 1, _ROWS_AT_ONCE):
            rows = np.asarray(logits[row : min(row + _ROWS_AT_ONCE, len(part) - 1)], np.float64)
            following = np.array(part[row + 1 : row + 1 + len(rows)])
            top = rows.max(-1)
            log_sum = top + np.log(np.exp(rows - top[:, None]).sum(-1))
            total += float((log_sum - rows[np.arange(len(rows)), following]).sum())
        count += len(part) - 1
    return math.exp(total / count) if total / count < 700 else math.inf
