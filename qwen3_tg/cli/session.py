"""A conversation as a file: JSON, written whole or not at all, readable by its owner alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen3_tg.atomic import PRIVATE, replacing
from qwen3_tg.chat import check_messages
from qwen3_tg.cli import settings
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import Qwen3Error, UsageError

FORMAT, VERSION = "qwen3_tg conversation", 1


@dataclass(frozen=True)
class Session:
    """What is kept. `config` is the fingerprint of the model's shape, `settings` are those that
    were chosen, `draws` is how many answers its seed has given."""

    model: str
    config: str
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    draws: int = 0


def fingerprint(config: ModelConfig) -> str:
    """Changes with whatever config.json says of the model; not with a longer context."""
    return hashlib.sha256(repr(replace(config, yarn=None)).encode()).hexdigest()[:16]


def write(path: Path, session: Session) -> None:
    """Replace the file in one step, so that a crash leaves the old one. Raises UsageError."""
    content = {"format": FORMAT, "version": VERSION} | asdict(session)
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    try:
        with replacing(path, PRIVATE) as part:
            part.write_bytes(text.encode("utf-8", "replace"))
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
        raise UsageError(f"{path}: cannot be written: {_reason(e)}; nothing was changed") from None


def read(path: Path) -> Session:
    """Raises UsageError that says what the file is instead."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, RuntimeError) as e:
        raise UsageError(f"{path}: not readable: {_reason(e)}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: not a conversation: byte {e.start} is not UTF-8") from None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        where = f" at line {e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UsageError(
            f"{path}: not a conversation, or damaged: not valid JSON{where}; expected a file that "
            "/save or --session wrote"
        ) from None
    try:
        return _session(content)
    except Qwen3Error as e:
        raise UsageError(f"{path}: {e}") from None


def _session(content: Any) -> Session:
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise UsageError("JSON, but not a conversation; expected a file that /save wrote")
    if content.get("version") != VERSION:
        raise UsageError(
            f"a conversation of version {content.get('version')!r}, expected {VERSION}: another "
            "qwen3_tg wrote it"
        )
    kinds: dict[str, tuple[type, ...]] = {
        "model": (str,),
        "config": (str,),
        "system": (str, type(None)),
        "messages": (list,),
        "settings": (dict,),
        "draws": (int,),
    }
    for name, kind in kinds.items():
        if name not in content:
            raise UsageError(f"damaged: it has no {name!r}")
        if not isinstance(content[name], kind):
            found = type(content[name]).__name__
            raise UsageError(f"damaged: {name!r} must be {kind[0].__name__}, found {found}")
    if unknown := set(content) - set(kinds) - {"format", "version"}:
        raise UsageError(f"damaged: {min(unknown)!r} is unknown")
    if content["draws"] < 0:
        raise UsageError(f"damaged: 'draws' must be at least 0, found {content['draws']}")
    messages = content["messages"]
    if messages:
        check_messages(messages)
    if places := [n for n, message in enumerate(messages) if message["role"] == "system"]:
        raise UsageError(f"damaged: message {places[0]} is a system message, which has its place")
    settings.check(content["settings"])
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # JSON can name half a character
        raise UsageError("damaged: a text in it is not valid Unicode") from None
    return Session(**{name: content[name] for name in kinds})


def _reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or str(e)
