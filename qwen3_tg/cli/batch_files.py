"""The files of `qwen3 generate --input --output`: a JSON line a prompt, and one an answer.

    {"prompt": "What is 37 + 85?", "id": "a-1", "max_new_tokens": 100}
    {"messages": [{"role": "user", "content": "What is 37 + 85?"}], "temperature": 0}

    {"line": 1, "id": "a-1", "text": "122", "thinking": "...", "end": "stop", ..., "key": "5f0c..."}
    {"line": 2, "error": "...", "key": "..."}

An answer is written when it is there, in one piece. `key` is a fingerprint of the line that was
asked, of the model and of the options: the same command takes up an unfinished file where it
stopped, and does not mix it with answers to something else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qwen3_tg.atomic import replacing
from qwen3_tg.cli import settings, terminal
from qwen3_tg.errors import Qwen3Error, UsageError
from qwen3_tg.sampling import Sampling

OF_A_LINE = (
    *("id", "prompt", "messages", "system", "tools", "stop", "logit_bias", "thinking"),
    *settings.RANGES,
)
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class Line:
    """One line of the input that is not empty, its `number` counted from 1: what it says, or the
    `problem` with it."""

    number: int
    key: str
    content: Mapping[str, Any]
    problem: Qwen3Error | None = None


def read_lines(name: str, raw: bool, about: str) -> list[Line]:
    """All lines of a file, or of stdin, "-". `about`: whatever else an answer depends on.

    Raises UsageError where the file cannot be read or has none."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as e:
        raise UsageError(f"--input {name}: not readable: {e.strerror or e}") from None
    lines = []
    for number, text in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if text.strip():
            key = hashlib.sha256(about.encode() + b"\0" + text.strip()).hexdigest()[:16]
            lines.append(_line(number, key, text, raw))
    if not lines:
        raise UsageError(f"--input {name}: no line in it")
    return lines


def _line(number: int, key: str, text: bytes, raw: bool) -> Line:
    content: Any = {}
    try:
        try:
            content = json.loads(text, parse_constant=_no_number)
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:  # JSON can name half a character
            raise UsageError("a text in it is not valid Unicode") from None
        except (ValueError, RecursionError) as e:
            raise UsageError(f"not valid JSON: {str(e)[:200]}") from None
        if isinstance(content, str):
            content = {"prompt": content}
        _check(content, raw)
    except Qwen3Error as e:
        return Line(number, key, content if isinstance(content, dict) else {}, e)
    return Line(number, key, content)


def _check(content: Any, raw: bool) -> None:
    """Raises UsageError for what a line must not be. What messages and tools must be is seen when
    they are used."""
    if not isinstance(content, dict):
        raise UsageError(f"must be an object or a text, found {type(content).__name__}")
    if unknown := set(content) - set(OF_A_LINE):
        raise UsageError(f"{min(unknown)!r} is unknown; a line may have {', '.join(OF_A_LINE)}")
    if ("prompt" in content) == ("messages" in content):
        raise UsageError('must have either "prompt" or "messages"')
    chosen = {n: v for n, v in content.items() if n == "thinking" or n in settings.RANGES}
    settings.check(chosen)
    kinds: dict[str, tuple[str, type | tuple[type, ...]]] = {
        **dict.fromkeys(("prompt", "system"), ("a text", str)),
        **dict.fromkeys(("messages", "tools"), ("a list", list)),
        "stop": ("a list or a text", (list, str)),
        "logit_bias": ("an object", dict),
    }
    for name, (expected, kind) in kinds.items():
        if name in content and not isinstance(content[name], kind):
            found = type(content[name]).__name__
            raise UsageError(f"{name!r} must be {expected}, found {found}")
    logit_bias(content)
    if "prompt" in content and not content["prompt"].strip():
        raise UsageError("the prompt is empty")
    if "system" in content and has_system(content.get("messages", [])):
        raise UsageError("'system' is also the first of the messages: leave one away")
    if content.get("thinking") == "off" and "thinking_budget" in content:
        raise UsageError("a thinking_budget has no meaning with thinking off")
    if raw:
        for name in ("messages", "system", "tools", "thinking", "thinking_budget"):
            if name in content:
                raise UsageError(f"{name!r} has no meaning with --raw")


def logit_bias(content: Mapping[str, Any]) -> dict[int, float] | None:
    """The biases of a line by token id, None where it has none of its own. Raises UsageError."""
    if "logit_bias" not in content:
        return None
    biases = content["logit_bias"]
    for id, bias in biases.items():
        if not _TOKEN_ID.fullmatch(id):
            raise UsageError(
                f"'logit_bias' must be by token id, such as \"1234\", found {id!r:.80}"
            )
        if not isinstance(bias, (int, float)) or isinstance(bias, bool):
            raise UsageError(f"'logit_bias' of {id} must be a number, found {bias!r:.80}")
    return dict(Sampling(logit_bias={int(id): bias for id, bias in biases.items()}).logit_bias)


def stop_strings(content: Mapping[str, Any]) -> list[str] | None:
    """Those of a line, None where it has none of its own."""
    stop = content.get("stop")
    return [stop] if isinstance(stop, str) else stop


def has_system(messages: list[Any]) -> bool:
    """Whether a system message is the first."""
    return bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Answers:
    """The output file, or stdout for "-". `done` are the numbers of the lines that it answers, of
    which `failed` with an error."""

    def __init__(self, name: str, lines: list[Line], source: str, retry: bool = False):
        """`source` is the name of the input. With `retry` answers that are errors are taken away,
        so that their lines, which may have been mended, are asked again. Raises UsageError for what
        is no place for answers."""
        self._retry = retry
        self._path = None if name == "-" else Path(name)
        if self._path and self._path.exists():
            if not self._path.is_file():
                raise UsageError(f"--output {name}: no regular file; left away, it is stdout")
            if source != "-" and self._path.samefile(source):
                raise UsageError(f"--output {name} is the --input itself")
        self._file: IO[bytes] | None = None
        self._lines = lines
        self.done: set[int] = set()
        self.failed: set[int] = set()
        self.cut_off = False  # an unfinished line at the end was taken away

    def __enter__(self) -> Answers:
        """Open the file, and take up what is there. Raises UsageError where that is not ours."""
        if self._path is None:
            return self
        try:
            self._file = self._path.open("a+b")
            _lock(self._file, self._path)
            self._file.seek(0)
            self._take(bytes(self._file.read()))
            if self._retry:
                self._forget_failed()
        except OSError as e:
            raise UsageError(f"--output {self._path}: {e.strerror or e}") from None
        return self

    def __exit__(self, *error: object) -> None:
        if self._file:
            self._file.close()

    def _take(self, data: bytes) -> None:
        """What an earlier run has written."""
        assert self._file is not None
        keys = {line.number: line.key for line in self._lines}
        *whole, rest = data.split(b"\n")
        for at, text in enumerate(whole, start=1):
            where = f"--output {self._path}, line {at}"
            try:
                answer = json.loads(text)
                number, key = int(answer["line"]), str(answer["key"])
            except (ValueError, RecursionError, TypeError, KeyError):
                raise UsageError(f"{where} is no answer of ours: name another file") from None
            if keys.get(number) != key and not (self._retry and "error" in answer):
                todo = "name another file, or go on with the same input and options"
                if "error" in answer:
                    todo = "--retry asks a line again whose answer is an error"
                raise UsageError(
                    f"{where} answers another prompt, or another model or other options: {todo}"
                )
            self._add(number, answer)
        if rest and not (rest.startswith(_BEGIN) or _BEGIN.startswith(rest)):
            where = f"--output {self._path}, line {len(whole) + 1}"
            raise UsageError(f"{where} is no answer of ours: name another file")
        if rest:
            self._file.truncate(len(data) - len(rest))
            self.cut_off = True

    def _forget_failed(self) -> None:
        """Raises OSError."""
        if not self._file or not self._path or not self.failed:
            return
        kept = [
            answer
            for answer in self._path.read_bytes().splitlines(keepends=True)
            if "error" not in json.loads(answer)
        ]
        with replacing(self._path) as part:
            part.write_bytes(b"".join(kept))
        self._file.close()
        self._file = self._path.open("a+b")  # the file is another one now
        _lock(self._file, self._path)
        self.done -= self.failed
        self.failed = set()

    def write(self, line: Line, answer: Mapping[str, Any]) -> None:
        """Add one, on the disk before anything else happens. Raises OSError."""
        id = {"id": line.content["id"]} if "id" in line.content else {}
        content = {"line": line.number, **id, **answer, "key": line.key}
        data = _json(content)
        if self._file is None:
            sys.stdout.write(data.decode())
            sys.stdout.flush()
        else:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        self._add(line.number, answer)

    def _add(self, number: int, answer: Mapping[str, Any]) -> None:
        self.done.add(number)
        if "error" in answer:
            self.failed.add(number)

    def sort(self) -> None:
        """Put them in the order of the input, once all are there."""
        if self._file is None or self._path is None:
            return

        def number(answer: bytes) -> int:
            return int(json.loads(answer)["line"])

        try:
            answers = self._path.read_bytes().splitlines(keepends=True)
            in_order = sorted(answers, key=number)
            if in_order != answers:
                with replacing(self._path) as part:
                    part.write_bytes(b"".join(in_order))
        except OSError as e:  # all are there
            terminal.note(
                f"note: {self._path} cannot be put in the order of the input: {e.strerror or e}"
            )


_BEGIN = b'{"line": '  # of what is written


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _lock(file: IO[bytes], path: Path) -> None:
    """Two that write to one file would answer everything twice."""
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--output {path}: another process is writing to it") from None
