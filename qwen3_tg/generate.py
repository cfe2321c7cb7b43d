"""From ids to the next id: prefill in chunks, decode one by one, and know when to stop.

The only owner of positions and of what the cache holds; where another text takes its place, it goes
to a shelf (shelf.py) and comes back when it is needed. Two graphs are captured (step_graph.py):
one computes a whole chunk of new positions, the other a single one. The position is an input of
both, so no length of text is compiled anew; only when the cache grows (see kv_cache.py) are they
captured again. Where tokens are guessed ahead (speculate.py), a third one computes few positions.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import NoReturn

import numpy as np

from qwen3_tg.config import ModelConfig
from qwen3_tg.device import Policy, check_memory
from qwen3_tg.errors import ContextError, DeviceError, UsageError, check_count
from qwen3_tg.forward import Forward
from qwen3_tg.kernel_cache import KernelCache
from qwen3_tg.kv_cache import KV_DTYPES, KVCache
from qwen3_tg.kv_sizes import cache_bytes, grown_capacity
from qwen3_tg.pace import FEW
from qwen3_tg.sampling import Sampling, Seen, sample
from qwen3_tg.shelf import WORTH, Kept, Shelf, common_prefix, is_continued, is_lost
from qwen3_tg.speculate import Model, Speculation
from qwen3_tg.step_graph import BatchGraph, StepGraph
from qwen3_tg.tuning import Tuning

# Positions whose logits are computed together where all are wanted: they are large.
_EVERY_CHUNK = 64
# tinygrad captures and schedules for a whole process: one thread computes at a time.
_ONE_AT_A_TIME = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A fork waits for that thread: a child has no other, and would never see the end of its step.
    _release = _ONE_AT_A_TIME.release
    os.register_at_fork(
        before=_ONE_AT_A_TIME.acquire, after_in_parent=_release, after_in_child=_release
    )


class Turn:
    """`with turn:` a thread computes, or reads and writes what is cached, while no other does. It
    must be one of the process that made this object: a forked child would write to its parent's
    memory. Raises UsageError."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                "the model was loaded in another process, and a forked one cannot use it: load it "
                'in this one, or start processes with multiprocessing.get_context("spawn")'
            )
        _ONE_AT_A_TIME.acquire()

    def __exit__(self, *_: object) -> None:
        _ONE_AT_A_TIME.release()


class Engine:
    """A model on a device with its cache. Asked for the logits after a sequence of ids, it computes
    only what neither the cache nor the shelf holds yet, so callers never speak of positions.

    `context` is the most positions it takes, `shelf_bytes` the most that other texts take in the
    host's memory. Works in the process that made it: in another one all that computes, or reads or
    writes what is cached, raises UsageError."""

    def __init__(
        self,
        config: ModelConfig,
        forward: Forward,
        policy: Policy,
        context: int,
        kernels: KernelCache,
        tuning: Tuning,
        shelf_bytes: int,
    ):
        self.context, self.turn = context, Turn()
        self.forward, self.kernels, self._vocab_size = forward, kernels, config.vocab_size
        self._config, self._policy = config, policy
        self._device, self._chunk = policy.device, policy.prefill_chunk
        # around the capture of a graph; `qwen3 tune` searches instead
        self.lowering: Callable[[], AbstractContextManager[None]] = tuning.applied
        # The last chunk of a full context reaches past its end with padding.
        self._cache = self.new_cache(context + policy.prefill_chunk)
        self._cached_ids: list[int] = []  # the ids whose keys and values the cache holds
        self._prompt = 0  # how many of them were the last prompt
        self._is_of_batch = False  # they go on in a slot of a batch
        self.shelf = Shelf(shelf_bytes)
        # ids guessed to follow those, with the logits after each: theirs are written, but held only
        # once they are asked for, so that guesses change nothing that is reused later
        self._ahead: list[tuple[int, np.ndarray]] = []
        self._graphs: dict[str, StepGraph] = {}
        self.captures = 0

    def __reduce__(self) -> NoReturn:
        raise TypeError("what a model computes with can be neither copied nor pickled")

    @property
    def cache_capacity(self) -> int:
        """Positions that the cache has room for at present; it grows up to the context."""
        return self._cache.capacity

    def new_cache(self, limit: int) -> KVCache:
        """An empty cache that grows up to so many positions."""
        policy = self._policy
        return KVCache(self._config, limit, KV_DTYPES[policy.kv_dtype], policy.device)

    def new_caches(self, count: int) -> list[KVCache]:
        """Those of a batch, with a position more than the context, where a full one waits. Raises
        DeviceError where there is no memory for them."""
        with self.turn:
            caches = [self.new_cache(self.context + 1) for _ in range(count)]
            self._check_room(sum(map(self.cache_bytes, caches)), f"what a batch of {count} keeps")
            return caches

    def cache_bytes(self, cache: KVCache) -> int:
        """Bytes of a cache on each device."""
        return self._cache_bytes(cache.capacity)

    def check_growth(self, cache: KVCache, positions: int) -> None:
        """Raises DeviceError where there is no memory for a cache with so many positions."""
        grown = grown_capacity(cache.capacity, positions, cache.limit)
        self._check_room(self._cache_bytes(grown), f"a cache of {grown} tokens")

    def _cache_bytes(self, capacity: int) -> int:
        whole = cache_bytes(self._config, capacity, self._policy.kv_dtype)
        return whole // len(self._policy.devices)

    def _check_room(self, nbytes: int, what: str) -> None:
        parts = {"keys and values": nbytes}
        check_memory(self._device, parts, what, "take a smaller batch")

    def batch_graph(self, caches: Sequence[KVCache]) -> BatchGraph:
        """A step of a batch with these caches."""
        return BatchGraph(self.forward, caches, self._device)

    def missing(self, ids: Sequence[int]) -> int:
        """How many of `ids` next_logits has to compute: none where the last one was guessed."""
        with self.turn:  # another thread may be changing what is cached
            if self._was_guessed(list(ids)):
                return 0
            shared = common_prefix(self._cached_ids, list(ids))
            if found := self._on_shelf(list(ids), shared):
                shared = found[1]
            return len(ids) - min(shared, len(ids) - 1)

    @property
    def row_bytes(self) -> list[int]:
        """Bytes of one position in each array of a kept text's rows."""
        return self._cache.row_bytes

    def computed(self, ids: Sequence[int]) -> tuple[int, int]:
        """The longest beginning of `ids` whose keys and values are there: how many tokens, and
        bytes."""
        with self.turn:
            _, n = self._longest(list(ids))
            return n, n * sum(self.row_bytes)

    def give(self, ids: Sequence[int]) -> Kept | None:
        """A copy of that beginning; None where there is none."""
        with self.turn:
            text, n = self._longest(list(ids))
            if text:
                return text.first(n)
            return Kept(list(ids[:n]), self._cache.rows(n), n) if n else None

    def _longest(self, ids: list[int]) -> tuple[Kept | None, int]:
        """The text on the shelf, or None for what is cached, and how many of these ids it has."""
        shared = common_prefix(self._cached_ids, ids)
        return self.shelf.find(ids, shared + 1) or (None, shared)

    def take(self, text: Kept) -> bool:
        """Put a text that `give` gave, of this model and computed in these types, on the shelf.
        False where it takes more than `shelf_bytes`."""
        assert [array.shape[1] for array in text.rows] == self.row_bytes
        with self.turn:
            return self.shelf.keep(text.ids, text.prompt, text.nbytes, lambda: text.rows)

    def next_logits(self, ids: Sequence[int], guess: Sequence[int] = ()) -> np.ndarray:
        """Logits for the token after `ids`, which start at position 0: (V,) float32.

        Where only the last id is missing, those after each of a `guess` of what follows are
        computed with it, as far as they fit: asked for next, they are there.
        Raises ContextError if they do not fit, UsageError for none or ids out of range."""
        with self.turn:
            return self._next_logits(list(ids), list(guess)[: self._size("few") - 1])

    def read_for_batch(self, ids: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits after a prompt that goes on elsewhere, and a copy of its rows, as KVCache.rows
        gives them. Its beginning is used by the next one that shares it, but never kept; what was
        cached before the first of them is."""
        with self.turn:
            if not self._is_of_batch and len(self._cached_ids) >= WORTH:
                self._keep()
            self._is_of_batch = True
            logits = self._next_logits(list(ids), [])
            self._is_of_batch = True
            return logits, self._cache.rows(len(ids))

    def _next_logits(self, ids: list[int], guess: list[int]) -> np.ndarray:
        self._check_length(ids)
        if self._was_guessed(ids):
            id, logits = self._ahead.pop(0)
            self._cached_ids.append(id)
            return logits
        # 1. Keep what there is of these ids; the last one is computed in any case.
        shared = common_prefix(self._cached_ids, ids)
        guess = guess[: self.context - len(ids)]
        self.check_ids(ids[shared:] + guess)
        shared = self._exchange(ids, shared)
        start = min(shared, len(ids) - 1)
        is_prompt = not start or start < len(self._cached_ids) or start < len(ids) - 1
        self._forget_from(start)
        self._reserve(len(ids))
        if guess and start == len(ids) - 1:
            return self._look_ahead([ids[-1], *guess], start)
        # 2. Compute the rest, a chunk at a time.
        while True:
            new = ids[start : start + self._chunk] if len(ids) - start > 1 else ids[start:]
            logits = self._run("decode" if len(new) == 1 else "prefill", new, start)
            self._cached_ids += new  # only once the step has succeeded
            start += len(new)
            if start == len(ids):
                self._prompt = len(ids) if is_prompt else self._prompt
                return logits

    def _exchange(self, ids: list[int], shared: int) -> int:
        """Before rows are overwritten by these ids, which share so many with what is cached: put
        that on the shelf where it would be lost, and take back what is there of them. How many are
        cached now; where it breaks off, no more is taken for cached than is."""
        found = self._on_shelf(ids, shared)
        if found is None:
            self._shelve(shared)
            return shared
        text, n = found
        # out of the way of what goes there now, or as the last to be pushed out by it
        if is_continued(text.prompt, n):
            self.shelf.remove(text)
        else:
            self.shelf.put(text)
        try:
            self._shelve(shared)
            self._reserve(len(ids))
            self._forget_from(0)
            self._cache.put(text.first(n).rows)
        except BaseException:
            self.shelf.put(text)
            raise
        self._cached_ids, self._prompt = ids[:n], min(text.prompt, n)
        return n

    def _on_shelf(self, ids: list[int], shared: int) -> tuple[Kept, int] | None:
        """A text there that shares more with these ids, so that it pays to take it back."""
        return self.shelf.find(ids, shared + WORTH) if len(ids) - shared >= WORTH else None

    def _shelve(self, shared: int) -> None:
        prompt = min(self._prompt, len(self._cached_ids))
        if not self._is_of_batch and is_lost(len(self._cached_ids), prompt, shared):
            self._keep()
        self._is_of_batch = False

    def _keep(self) -> None:
        """Put what is cached on the shelf."""
        ids, prompt = self._cached_ids, min(self._prompt, len(self._cached_ids))
        nbytes = len(ids) * sum(self.row_bytes)
        self.shelf.keep(ids, prompt, nbytes, lambda: self._cache.rows(len(ids)))

    def _look_ahead(self, new: list[int], start: int) -> np.ndarray:
        """Logits after the first of new ids; those after the others are kept for when they are
        asked for."""
        first, *others = self._run("few", new, start)
        self._cached_ids.append(new[0])
        self._ahead = list(zip(new[1:], others, strict=True))
        logits: np.ndarray = first
        return logits

    def _was_guessed(self, ids: list[int]) -> bool:
        return bool(self._ahead) and ids == [*self._cached_ids, self._ahead[0][0]]

    def all_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after every one of `ids`: (S, V) float32. Errors as for next_logits."""
        with self.turn:
            return self._all_logits(list(ids))

    def _all_logits(self, ids: list[int]) -> np.ndarray:
        self._check_length(ids)
        self.check_ids(ids)
        self._shelve(0)
        self._forget_from(0)
        self._reserve(len(ids))
        rows = []
        for start in range(0, len(ids), self._size("all")):
            new = ids[start : start + self._size("all")]
            rows.append(self._run("all", new, start))
            self._cached_ids += new
        self._prompt = len(ids)
        return np.concatenate(rows)

    def _check_length(self, ids: list[int]) -> None:
        if not ids:
            raise UsageError("no tokens to continue: give at least one id")
        if len(ids) > self.context:
            raise ContextError(
                f"{len(ids)} tokens do not fit in the context of {self.context}; "
                "shorten the text or load with a larger context"
            )

    def check_ids(self, ids: list[int]) -> None:
        """Raises UsageError for what is no id of the vocabulary."""
        size = self._vocab_size
        for id in ids:
            if not isinstance(id, Integral) or not 0 <= id < size:
                raise UsageError(f"token id {id!r} is not in the vocabulary of {size}")

    def _forget_from(self, start: int) -> None:
        """To call before rows from `start` on are overwritten: a step may break off halfway."""
        del self._cached_ids[start:]
        self._ahead = []

    def _reserve(self, positions: int) -> None:
        positions += self._chunk - 1  # the last chunk is padded
        if positions > self._cache.capacity:
            self._graphs.clear()  # first, as they write to the old buffers
            self._cache.grow(positions)

    def _size(self, kind: str) -> int:
        """New positions that a graph computes."""
        sizes = {"decode": 1, "few": FEW, "prefill": self._chunk, "all": _EVERY_CHUNK}
        return min(sizes[kind], self._chunk)

    def _run(self, kind: str, new: list[int], start: int) -> np.ndarray:
        """One step of the graph `kind` on new ids at positions start, start + 1, ..."""
        known = kind in self._graphs
        if not known:
            size, every = self._size(kind), kind in ("all", "few")
            self._graphs[kind] = StepGraph(self.forward, self._cache, self._device, size, every)
        with nullcontext() if known else self.capturing():
            logits = self._graphs[kind](new, start)
        if problem := self.problem(logits):
            raise problem
        return logits

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Around the first run of a graph."""
        with self.kernels.reporting(), self.lowering():
            yield
        self.captures += 1
        self.kernels.save()

    def problem(self, logits: np.ndarray) -> DeviceError | None:
        """What is wrong with logits that are not numbers."""
        if np.isfinite(logits).all():
            return None
        return DeviceError(
            f"{self._device} gave logits that are not finite numbers: the weights are damaged, "
            "or numbers overflow there; try --dtype float32, or another --device"
        )


@dataclass(frozen=True)
class Step:
    """How an id was chosen: the n-th new one, counted from 0, out of `logits` (V,) after the ids
    `before` it, by `sampling`; `allowed` as in sampling.py. `seen` and `before` go on changing."""

    n: int
    id: int
    logits: np.ndarray
    sampling: Sampling
    seen: Seen
    before: Sequence[int]
    allowed: np.ndarray | None = None


OnStep = Callable[[Step], None]


class Generation(Iterator[int]):
    """The ids that follow `prompt`, one by one. Also says, while running and after: `stop_reason`
    (None until the end; then "stop", "length" or "context"), `stop_id`, counts, and seconds.
    `sampling` may be changed on the way, and `allow`, which is called with the ids since the prompt
    and gives the mask of those that may come next, (V,) bool, or None for all. `on_step` is told of
    each id that is drawn. `speculation` makes it faster, where it does."""

    def __init__(
        self,
        engine: Model,
        prompt: Sequence[int],
        max_new_tokens: int | None,
        sampling: Sampling,
        stop_ids: Collection[int],
        speculation: Speculation | None = None,
    ):
        check_count("max_new_tokens", max_new_tokens, least=1)
        if len(prompt) >= engine.context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context {engine.context}: "
                "no room for an answer; shorten the prompt or load with a larger context"
            )
        self._engine, self.sampling, self._stop_ids = engine, sampling, frozenset(stop_ids)
        self._ids, self._seen, self.speculation = list(prompt), Seen(prompt), speculation
        self.max_new_tokens = max_new_tokens
        self.prompt_tokens, self.new_tokens = len(prompt), 0
        self.first_token_s = self.later_tokens_s = 0.0
        self.stop_reason: str | None = None
        self.stop_id: int | None = None
        self.on_step: OnStep | None = None
        self.allow: Callable[[Sequence[int]], np.ndarray | None] | None = None

    @property
    def room(self) -> int:
        """How many more ids fit in the context."""
        return max(0, self._engine.context - len(self._ids))

    @property
    def ids(self) -> Sequence[int]:
        """The prompt and all since."""
        return self._ids

    @property
    def new_ids(self) -> list[int]:
        """The ids since the prompt."""
        return self._ids[self.prompt_tokens :]

    def __next__(self) -> int:
        if self.stop_reason is None:
            if self.max_new_tokens is not None and self.new_tokens >= self.max_new_tokens:
                self.stop_reason = "length"
            elif len(self._ids) >= self._engine.context:
                self.stop_reason = "context"
        if self.stop_reason is not None:
            raise StopIteration
        began = time.perf_counter()
        logits = self._logits()
        allowed = self.allow(self.new_ids) if self.allow else None
        id = sample(logits, self.sampling, self.new_tokens, self._seen, allowed)
        if self.speculation:
            self.speculation.took(id)
        if self.on_step:
            how = self.sampling, self._seen, self._ids, allowed
            self.on_step(Step(self.new_tokens, id, logits, *how))
        if self.new_tokens == 0:
            self.first_token_s += time.perf_counter() - began
        else:
            self.later_tokens_s += time.perf_counter() - began
        if id in self._stop_ids:
            self.stop_reason, self.stop_id = "stop", id
            raise StopIteration
        self._append([id])
        return id

    def _logits(self) -> np.ndarray:
        if self.speculation is None:
            return self._engine.next_logits(self._ids)
        room = self.room
        if self.max_new_tokens is not None:  # the token that these logits are for is one of them
            room = min(room, self.max_new_tokens - self.new_tokens - 1)
        return self.speculation.next_logits(self._engine, self._ids, room, self._choose)

    def _choose(self, logits: np.ndarray, ahead: Sequence[int] = ()) -> int:
        """The token to take from these logits, after so many more tokens."""
        seen = self._seen
        if ahead:
            seen = Seen(answer=seen.answer + Counter(ahead))
            seen.prompt = self._seen.prompt
        return sample(logits, self.sampling, self.new_tokens + len(ahead), seen)

    def waited(self, seconds: float) -> None:
        """Count time that the logits of the next token took elsewhere."""
        if self.new_tokens == 0:
            self.first_token_s += seconds
        else:
            self.later_tokens_s += seconds

    def insert(self, ids: Sequence[int]) -> list[int]:
        """Continue as if these ids had been generated, as far as they fit; returns those."""
        fitting = list(ids)[: self.room]
        self._append(fitting)
        if self.speculation:
            self.speculation.drop()
        return fitting

    def _append(self, ids: Sequence[int]) -> None:
        self._ids += ids
        self._seen.answer.update(ids)
        self.new_tokens += len(ids)
