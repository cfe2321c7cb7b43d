"""`--tools FILE.json`: what the model may call, and in a chat the commands that answer it.

    [{"type": "function",
      "function": {"name": "word_count", "description": "Count the words of a text.",
                   "parameters": {"type": "object", "properties": {"text": {"type": "string"}},
                                  "required": ["text"]}},
      "command": ["wc", "-w"]}]

A command is a list of words, run as it is and by no shell. `{text}` in a word stands for that
argument; a command without such a place gets all arguments as JSON on stdin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_tg.errors import UsageError
from qwen3_tg.tools import ToolError, check_schema

_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class FileTool:
    """A tool of the file: its schema as the model reads it, and its command, if it has one."""

    schema: Mapping[str, Any]
    command: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    @property
    def parameters(self) -> Mapping[str, Any]:
        parameters: Mapping[str, Any] = self.schema["function"]["parameters"]
        return parameters

    @property
    def has_places(self) -> bool:
        return any(_PLACE.search(word) for word in self.command or ())

    def words(self, arguments: Mapping[str, Any]) -> list[str]:
        """The command with the arguments in their places: a text as it is, all else as JSON.

        Raises ToolError where a text would become an option of the command, such as one that
        writes to a file: it begins with - in a word of its own, and there is no -- before it."""
        properties = self.parameters.get("properties", {})

        def argument(name: str) -> Any:
            return arguments[name] if name in arguments else properties[name]["default"]

        def value(found: re.Match[str]) -> str:
            value = argument(found[1])
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

        words: list[str] = []
        for pattern in self.command or ():
            word = _PLACE.sub(value, pattern)
            place = _PLACE.match(pattern)
            is_text = place is not None and isinstance(argument(place[1]), str)
            if is_text and word.startswith("-") and "--" not in words:
                raise ToolError(
                    f"{word!r} begins with -, so that {words[0]} may take it for an option; it was "
                    'not run. Whoever wrote the command can put "--" before the argument'
                )
            words.append(word)
        return words


def read_tools(file: str) -> list[FileTool]:
    """The tools of a file. Raises UsageError naming the file and the field that is wrong."""
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"--tools {file}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise UsageError(f"--tools {file}: not valid JSON: {e}") from None
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{file}: expected a list of functions, found {_shown(entries)}")
    tools = [_tool(entry, f"{file}: [{n}]") for n, entry in enumerate(entries)]
    names = [tool.name for tool in tools]
    for n, name in enumerate(names):
        if name in names[:n]:
            raise UsageError(f"{file}: [{n}]: the name {name!r} is that of [{names.index(name)}]")
    return tools


def _tool(entry: Any, where: str) -> FileTool:
    command, rest = None, entry
    if isinstance(entry, Mapping):
        command, rest = entry.get("command"), {k: v for k, v in entry.items() if k != "command"}
    schema = check_schema(rest, where)
    if command is None:
        return FileTool(schema, None)
    words = isinstance(command, list) and all(isinstance(word, str) for word in command)
    if not words or not command or not command[0]:
        raise UsageError(
            f"{where}.command: expected a list of words, such as "
            f'["wc", "-w"], found {_shown(command)}'
        )
    parameters = schema["function"]["parameters"]
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if _PLACE.search(command[0]):
        raise UsageError(f"{where}.command[0]: the program itself cannot be an argument")
    for n, word in enumerate(command):
        for name in _PLACE.findall(word):
            if name not in properties:
                known = ", ".join(properties) or "none"
                raise UsageError(
                    f"{where}.command[{n}]: {{{name}}} is no parameter; they are: {known}"
                )
            about = properties[name]
            if name not in required and not (isinstance(about, Mapping) and "default" in about):
                raise UsageError(
                    f"{where}.command[{n}]: {{{name}}} may be left away by the model: list it in "
                    '"required", or give it a "default"'
                )
    return FileTool(schema, tuple(command))


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {json.dumps(value):.60}"
