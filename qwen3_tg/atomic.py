"""Files that are written whole or not at all, whatever breaks off in the middle."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

PRIVATE = stat.S_IRUSR | stat.S_IWUSR  # its owner alone reads and writes it
_SHARED = 0o666  # as the user's umask has it


@contextlib.contextmanager
def replacing(path: Path, mode: int = _SHARED) -> Iterator[Path]:
    """Gives a new, empty file beside `path` to write to, which then takes its place in one step; a
    crash or an exception leaves what was there before. A link stays a link, and a file that was
    there keeps its mode. Raises OSError, and RuntimeError for links in a circle."""
    path = path.resolve()
    part = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if path.exists():
            part.chmod(stat.S_IMODE(path.stat().st_mode))
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
