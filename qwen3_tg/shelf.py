"""Texts whose keys and values are kept in the host's memory while another one is computed, within a
number of bytes: the one that was not needed for longest goes first.

Knows nothing of devices: rows are bytes, and what they are of is told by the ids alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Fewer tokens than these are computed sooner than it pays to think of them.
WORTH = 32
# Tokens at the end of a prompt that the next one of the same conversation need not repeat: those
# that open and close a thinking that is not wished.
_OPENING = 4
# Of a text, less is computed again sooner than all of it is copied. Measured in the shape of
# Qwen3-0.6B on two cores of a CPU: 7 ms to compute a token, up to 0.2 ms to copy it to and fro; a
# GPU computes it faster and copies it faster.
_PART = 1 / 8


@dataclass(frozen=True)
class Kept:
    """A text that begins at position 0. `rows` are kv_cache.py's, (ids, bytes of a position) each;
    `prompt` is how many of the ids were the last prompt: those after it are an answer, of which the
    next prompt often drops the thinking."""

    ids: Sequence[int]
    rows: Sequence[np.ndarray]
    prompt: int

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.rows)

    def first(self, n: int) -> Kept:
        """Only the first n ids."""
        return Kept(self.ids[:n], [array[:n] for array in self.rows], min(self.prompt, n))


class Shelf:
    """Kept texts, at most `limit_bytes` of their rows. While one is exchanged for another, both are
    in memory."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._texts: list[Kept] = []  # the one needed last is the last

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def nbytes(self) -> int:
        return sum(text.nbytes for text in self._texts)

    def find(self, ids: Sequence[int], least: int) -> tuple[Kept, int] | None:
        """The text that shares the longest beginning with these ids, and how long it is; None where
        it is shorter than `least`."""
        shared = [(common_prefix(text.ids, ids), text) for text in self._texts]
        n, found = max(shared, key=lambda one: one[0], default=(0, None))
        return (found, n) if found and n >= max(least, 1) else None

    def put(self, text: Kept) -> None:
        """As the one needed last, also one that was there."""
        self.remove(text)
        self._make_room(text.nbytes)
        self._texts.append(text)

    def remove(self, text: Kept) -> None:
        self._texts = [one for one in self._texts if one is not text]

    def keep(
        self, ids: Sequence[int], prompt: int, nbytes: int, read: Callable[[], Sequence[np.ndarray]]
    ) -> bool:
        """Keep a text of so many bytes, in the place of those that are its beginning; `read` gives
        its rows. False where it takes more than the limit, or main memory has no room for it."""
        if nbytes > self.limit_bytes:
            return False
        if same := self.find(ids, len(ids)):
            self.put(same[0])
            return True
        self._texts = [one for one in self._texts if common_prefix(one.ids, ids) < len(one.ids)]
        self._make_room(nbytes)
        try:
            self._texts.append(Kept(list(ids), read(), prompt))
        except MemoryError:
            return False
        return True

    def _make_room(self, nbytes: int) -> None:
        while self._texts and self.nbytes + nbytes > self.limit_bytes:
            del self._texts[0]


def is_continued(prompt: int, shared: int) -> bool:
    """Whether a text that shares so many tokens with one whose last prompt was so long is its next
    turn, or another answer to it."""
    return shared >= max(prompt - _OPENING, prompt / 2)


def is_lost(length: int, prompt: int, shared: int) -> bool:
    """Whether what is computed of a text is to be kept, when another one takes its place.

    Not where all of the last prompt is shared: the next turn drops the last answer's thinking
    alone, which can be most of the text. Nor where little is lost, as by an edited question: to be
    kept, all of it is copied."""
    return length - shared >= max(WORTH, _PART * length) and not is_continued(prompt, shared)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:  # the usual case, at the speed of C
        return shorter
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), shorter)
