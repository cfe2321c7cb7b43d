"""Run one command of the user's for the model: by no shell, for a limited time, with what it prints
cut to a limit. Knows nothing of models and schemas."""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from qwen3_tg.tools import ToolError

_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Of one command: how long it may run, and how much of what it prints is kept."""

    seconds: float
    output_bytes: int


def run_command(words: Sequence[str], stdin: str | None, limits: Limits) -> str:
    """What the command printed, without the line breaks at its end, as a shell's $(...) gives it.
    `stdin` None: it reads nothing.

    Raises ToolError, with what it printed, where it cannot be started, fails or takes too long; in
    the last case, and after Ctrl-C, it is ended with all that it started."""
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that all it starts can be ended, and Ctrl-C is ours
        )
    except (OSError, ValueError) as e:  # ValueError: an argument with a NUL, or half a character
        raise ToolError(f"{words[0]} cannot be run: {e}") from None
    assert process.stdout is not None and process.stderr is not None
    out, errors = (_Reader(s, limits.output_bytes) for s in (process.stdout, process.stderr))
    if process.stdin is not None:
        threading.Thread(target=_feed, args=(process.stdin, stdin or ""), daemon=True).start()
    end = time.monotonic() + limits.seconds
    late = True
    try:
        process.wait(limits.seconds)
        for reader in (out, errors):  # longer than the command where it left something behind
            reader.join(max(0.0, end - time.monotonic()))
        late = out.is_alive() or errors.is_alive()
    except subprocess.TimeoutExpired:
        pass
    finally:
        if late:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            out.join(1)
            errors.join(1)
    if late:
        raise ToolError(f"it took longer than {limits.seconds:g} s and was stopped\n{out.text()}")
    if process.returncode != 0:
        how = f"exit code {process.returncode}"
        raise ToolError(f"{how}\n{out.text()}{errors.text()}".rstrip("\n"))
    return out.text().rstrip("\n")


class _Reader(threading.Thread):
    """Reads a stream to its end and keeps its first bytes: the limit holds no command up."""

    def __init__(self, stream: IO[bytes], limit_bytes: int):
        super().__init__(daemon=True)
        self._stream, self._limit = stream, limit_bytes
        self._kept, self._seen = bytearray(), 0
        self.start()

    def run(self) -> None:
        with self._stream:
            while block := os.read(self._stream.fileno(), _BLOCK_BYTES):
                self._kept += block[: self._limit - len(self._kept)]
                self._seen += len(block)

    def text(self) -> str:
        if self._seen <= self._limit:
            return self._kept.decode("utf-8", errors="replace")
        # a character that the limit cuts in two is left away
        kept = codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(self._kept))
        return f"{kept}\n(cut: the first {self._limit} of {self._seen} bytes)"


def _feed(stream: IO[bytes], text: str) -> None:
    with contextlib.suppress(BrokenPipeError, OSError), stream:  # it need not read
        stream.write(text.encode("utf-8", errors="replace"))
