"""The file beside a conversation's, FILE.kv, that holds what was computed of it, so that a later
run computes only what is new.

It is only ever a help: where it is missing, damaged, of another model or out of date, as after
/undo or a crash, what it lacks is computed anew. What of it is used is told by its tokens.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from qwen3_tg import prefix_file
from qwen3_tg.cli import terminal
from qwen3_tg.cli.conversation import Conversation
from qwen3_tg.errors import UsageError
from qwen3_tg.shelf import WORTH

_HEADER_BYTES = 2**20  # more than a file has besides keys and values


class ComputedFile:
    """Writes and reads it for a conversation; says what came of it in notes. With a limit of 0 for
    what is kept there is none."""

    def __init__(self, conversation: Conversation):
        self._talk = conversation
        self._written: tuple[Path, list[int]] | None = None  # what is known to be in a file
        self._has_told_size = False

    def check(self, path: Path) -> None:
        """Refuse a new conversation's file where beside it lies one that is none of ours. Raises
        UsageError."""
        file = _beside(path)
        try:
            if self._limit and file.exists() and not prefix_file.is_one(file):
                raise UsageError(
                    f"{file}: there is such a file, where what is computed of the conversation "
                    "goes; choose another name, or --prefix-cache 0"
                )
        except OSError as e:
            raise UsageError(f"{file}: not readable: {e.strerror or e}") from None

    def beside(self, path: Path) -> Path | None:
        """The file beside that of a conversation, if one is to be written."""
        return _beside(path) if self._limit else None

    def load(self, path: Path) -> None:
        """Take what is there for the conversation that was just loaded."""
        file, llm = _beside(path), self._talk.llm
        if not self._limit or not file.exists():
            return
        try:
            size = file.stat().st_size
            taken = size <= self._limit + _HEADER_BYTES and llm.load_computed(file)
        except (UsageError, OSError) as e:
            terminal.note(f"note: {file}: {e}; the conversation is computed anew")
            return
        if not taken:
            terminal.note(
                f"note: {file}: its {size:,} bytes are more than the "
                f"{self._limit:,} of --prefix-cache; the conversation is computed anew"
            )
            return
        ids = self._talk.next_ids()
        tokens, _ = llm.computed(ids)
        if tokens >= WORTH:
            terminal.note(f"({tokens:,} tokens of it are computed already)")
        self._written = file, ids[:tokens]

    def save(self, path: Path) -> int:
        """Write what is computed of the conversation, unless it is there already. How many tokens
        are in the file; 0 where nothing was to be written, or could not be, which is told. Of a
        conversation that was cleared nothing stays."""
        file, llm = _beside(path), self._talk.llm
        ids = self._talk.next_ids() if self._talk.messages else []
        tokens, nbytes = llm.computed(ids)
        if tokens and self._written == (file, ids[:tokens]):
            return tokens
        try:
            if file.exists() and not prefix_file.is_one(file):
                if self._limit:
                    terminal.note(f"note: {file} is none of ours, and stays; nothing is kept there")
                return 0
            if len(ids) < WORTH:
                file.unlink(missing_ok=True)
        except OSError as e:
            terminal.note(f"note: {file}: cannot be written: {e.strerror or e}")
            return 0
        if not self._limit or tokens < WORTH:
            return 0
        if nbytes > self._limit:
            if not self._has_told_size:
                terminal.note(
                    f"note: what is computed of the conversation, {nbytes:,} bytes, is not kept in "
                    f"{file}: --prefix-cache is {self._limit:,}; a later run computes it anew"
                )
            self._has_told_size = True
            return 0
        try:
            with terminal.progress(f"writing {file.name}"):
                llm.save_computed(file, ids)
        except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
            reason = getattr(e, "strerror", None) or str(e)
            terminal.note(f"note: {file}: cannot be written: {reason}")
            return 0
        self._written = file, ids[:tokens]
        return tokens

    @property
    def _limit(self) -> int:
        return self._talk.llm.prefix_cache_bytes


def _beside(path: Path) -> Path:
    """Where the file itself is, if `path` is a link to it."""
    with contextlib.suppress(RuntimeError):  # links in a circle, of which writing tells
        path = path.resolve()
    return path.with_name(f"{path.name}.kv")
