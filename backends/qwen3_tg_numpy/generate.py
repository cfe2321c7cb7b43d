"""Token after token: run the model, choose from its last row of logits, feed the choice back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from qwen3_tg_numpy.model import KVCache, Qwen3
from qwen3_tg_numpy.sampling import Sampling, sample


def generate_ids(
    model: Qwen3,
    ids: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that follow `ids`, as they are made. ids: (S,) -> up to max_new_tokens ids

    Ends after max_new_tokens, before the first token that is in stop_ids (which is not given), or
    when prompt and new tokens fill config.max_positions. Raises ValueError at the call, not at
    the first token."""
    prompt = model.config.check_ids(ids, start_pos=0)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, found {max_new_tokens}")
    room = model.config.max_positions - len(prompt)
    return _generate(model, prompt, min(max_new_tokens, room), sampling, frozenset(stop_ids))


def _generate(
    model: Qwen3, new: np.ndarray, limit: int, sampling: Sampling, stop_ids: frozenset[int]
) -> Iterator[int]:
    cache = KVCache(model.config)
    prompt, answer = new.tolist(), list[int]()
    for n in range(limit):
        # 1. Run what the cache has not seen: the prompt at first, then one token at a time.
        x = model.hidden(new, cache)  # (S, D)
        # 2. Choose by the last position.
        token = sample(model.logits(x[-1:])[0], sampling, n, prompt, answer)
        if token in stop_ids:
            return
        answer.append(token)
        yield token
        # 3. The choice is the next input.
        new = np.array([token])
