"""Models on the hub, read without fetching them: small files whole, of large ones the header.

For planning: a checkpoint of 60 GB costs one request of 100 KB a file.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO, cast

from qwen3_tg.errors import CheckpointError
from qwen3_tg.hub import HubFile, Interrupted, Listing, Misled, Tries, list_files, open_file

# The first block fetched; the next ones grow as long as reading goes on. Most headers of
# safetensors files are below 100 KB; a GGUF file's, with the tokenizer in it, is up to 10 MB.
_FIRST_BYTES = 100_000
_LARGEST_BLOCK_BYTES = 4_000_000


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub, of `size` bytes."""

    size: int


def remote_files(name: str, revision: str | None = None) -> dict[str, RemoteFile]:
    """The files of a model on the hub by name. Raises CheckpointError, one line."""
    return {file.name: RemoteFile(file.size) for file in _listing(name, revision).files.values()}


def open_remote(name: str, filename: str, revision: str | None = None) -> BinaryIO:
    """A seekable file of a model on the hub; only what is read is fetched. Reading raises
    CheckpointError."""
    listing = _listing(name, revision)
    if filename not in listing.files:
        raise CheckpointError(f"{listing.name}: no {filename} in it on the hub")
    return RangeFile(listing, listing.files[filename]).buffered()


@lru_cache(maxsize=8)  # asked for again with each file
def _listing(name: str, revision: str | None) -> Listing:
    return list_files(name, revision)


class RangeFile(io.RawIOBase):
    """A file on the hub through range requests. `fetched_bytes` counts what came."""

    def __init__(
        self, listing: Listing, file: HubFile, note: Callable[[str], None] | None = None
    ) -> None:
        self._listing, self._file, self._note = listing, file, note
        self._position = 0
        self._block, self._block_start = b"", 0
        self._next_bytes = _FIRST_BYTES
        self.fetched_bytes = 0

    def buffered(self) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(self, 1 << 16))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        if self._position >= self._file.size or not len(buffer):
            return 0
        if not 0 <= self._position - self._block_start < len(self._block):
            self._fetch(len(buffer))
        at = self._position - self._block_start
        data = self._block[at : at + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, wanted: int) -> None:
        if self._position != self._block_start + len(self._block):
            self._next_bytes = _FIRST_BYTES  # reading goes on elsewhere
        start = self._position
        end = min(start + max(self._next_bytes, wanted), self._file.size)
        self._next_bytes = min(2 * self._next_bytes, _LARGEST_BLOCK_BYTES)
        self._block = _read_range(self._listing, self._file, start, end, self._note)
        self._block_start = start
        self.fetched_bytes += end - start


def _read_range(
    listing: Listing, file: HubFile, start: int, end: int, note: Callable[[str], None] | None
) -> bytes:
    got, tries = bytearray(), Tries(note, reached=True)
    while len(got) < end - start:
        try:
            with open_file(listing, file, start + len(got), end) as body:
                if body.start != start + len(got) or body.end > end:
                    raise CheckpointError(
                        f"{listing.name}: the server gives {file.name} only as a whole "
                        f"({file.size} bytes), not in parts; fetch the model to read it"
                    )
                for chunk in body.chunks:
                    got += chunk
                    if len(got) > end - start:
                        raise Misled(f"{file.name}: the server sends more than was asked for")
            if len(got) < end - start:
                raise Interrupted(f"{file.name}: the server sent less than was asked for")
        except Interrupted as e:
            tries.wait(e)
        except Misled as e:
            raise CheckpointError(f"{listing.name}: {e}") from None
    return bytes(got)
