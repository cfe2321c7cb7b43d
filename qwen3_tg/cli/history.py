"""What was typed in former conversations, kept in a file that only its owner reads."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from qwen3_tg.atomic import PRIVATE, replacing
from qwen3_tg.cli import terminal
from qwen3_tg.compiler import is_ours

_MOST_BYTES = 1 << 20  # then the older half goes


def open_history(keep: bool) -> History:
    """The file's history; one of this run alone where it is not to be kept, or cannot be."""
    if not keep:
        return InMemoryHistory()
    try:
        path = _file()
        _shorten(path)
        return _PrivateHistory(str(path))
    except (OSError, RuntimeError) as e:  # RuntimeError: a user without a home
        reason = getattr(e, "strerror", None) or str(e)
        terminal.note(f"note: what you type is not kept for the next time: {reason}")
        return InMemoryHistory()


class _PrivateHistory(FileHistory):
    """Where the disk is full, the rest is of this run alone."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError:
            return


def _file() -> Path:
    """In the user's state folder, with everyone else kept out."""
    base = Path.home() / ("Library/Application Support" if _is_mac() else ".local/state")
    folder = Path(os.environ.get("XDG_STATE_HOME") or base) / "qwen3_tg"
    folder.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    path = folder / "history"
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, PRIVATE))
    if not is_ours(folder) or not (is_ours(path) or path.stat().st_uid == os.geteuid()):
        raise OSError(f"others can write in {folder}")
    path.chmod(PRIVATE)
    return path


def _is_mac() -> bool:
    return sys.platform == "darwin"


def _shorten(path: Path) -> None:
    """Drop the older half of a long file; an entry begins with an empty line and a `#`."""
    data = path.read_bytes()
    if len(data) <= _MOST_BYTES:
        return
    start = data.find(b"\n\n#", len(data) // 2)
    with replacing(path, PRIVATE) as shorter:
        shorter.write_bytes(data[start + 1 :] if start >= 0 else b"")
