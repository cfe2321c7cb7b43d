"""A text file that goes into a message."""

from __future__ import annotations

from pathlib import Path

from qwen3_tg.errors import UsageError

# No token of Qwen3 that texts are made of is nearly so long on average.
_BYTES_A_TOKEN = 64


def read(path: Path, context: int) -> str:
    """Its text. Raises UsageError where it is missing, no text, or too long for the context."""
    try:
        if path.is_dir():
            raise UsageError(f"{path}: a folder; expected a text file")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: a device or a pipe; expected a text file")
        size = path.stat().st_size
        if size > context * _BYTES_A_TOKEN:
            raise UsageError(f"{path}: {size:,} bytes do not fit in {context:,} tokens of context")
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"{path}: not readable: {e.strerror}") from None
    if b"\0" in data:
        raise UsageError(f"{path}: binary (a zero byte at {data.index(0)}); expected a text file")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path}: not valid UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}; "
            "convert it first, for instance with iconv"
        ) from None
    if not text.strip():
        raise UsageError(f"{path}: empty")
    return text
