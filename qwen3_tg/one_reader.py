"""An iterator over what a generator gives, for one reader at a time, that anyone can end."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from qwen3_tg.errors import UsageError

T = TypeVar("T")


class OneReader(Iterator[T], Generic[T]):
    """`what` names it in messages, such as "a reply"."""

    def __init__(self, source: Generator[T, None, None], what: str):
        self._source, self._what = source, what
        self._reading, self._closed = threading.Lock(), False

    def __next__(self) -> T:
        """Raises UsageError while another is waiting for the next one."""
        if not self._reading.acquire(blocking=False):
            raise UsageError(
                f"{self._what} is being read already, by another thread or further up in this one: "
                "only one can read it at a time"
            )
        try:
            if self._closed:
                self._source.close()
            return next(self._source)
        finally:
            self._reading.release()

    def close(self) -> None:
        """End it: nothing more comes, after what a reader is waiting for at present, if one is."""
        self._closed = True
        if self._reading.acquire(blocking=False):
            try:
                self._source.close()
            finally:
                self._reading.release()
