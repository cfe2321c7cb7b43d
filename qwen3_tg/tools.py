"""Tools that a model may call: what it is told of them, and what a call of one gives.

Whatever goes wrong in a call, a name that is not there, arguments that do not fit, a function that
raises, becomes a result that says so, which the model reads and can repair. Knows neither models
nor terminals: who runs a tool is a function, of the caller's or of cli/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_tg.errors import UsageError
from qwen3_tg.json_schema import schema_problem, value_problem
from qwen3_tg.reply import ToolCall
from qwen3_tg.tool_schema import function_schema

# OpenAI's rule for names; the chat template writes them into JSON as they are.
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class ToolError(Exception):
    """Raised by a tool to tell the model, in these words, why there is no result."""


@dataclass(frozen=True)
class ToolResult:
    """What the model is told a call gave. `failed`: it is a problem and not a result; `error` is
    what the tool raised, if it did. `call` is None for one that could not be read."""

    call: ToolCall | None
    content: str
    failed: bool = False
    error: Exception | None = None


@dataclass(frozen=True)
class Tool:
    """`schema` is what the model reads, `run` takes arguments that fit `parameters` and gives a
    text or what json.dumps takes."""

    schema: Mapping[str, Any]
    parameters: Mapping[str, Any]
    run: Callable[[dict[str, Any]], Any]

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """A plain Python function as a tool. Raises UsageError for other callables, and where it
        does not say what it takes."""
        schema = check_schema(function_schema(function), f"tool {function.__name__}")
        # A name it does not know would be a TypeError; told beforehand it can be repaired.
        parameters = schema["function"]["parameters"] | {"additionalProperties": False}
        return cls(schema, parameters, lambda arguments: function(**arguments))


def schemas_of(tools: Sequence[Any] | None) -> list[Mapping[str, Any]] | None:
    """What the chat template takes, of Python functions, `Tool`s and schemas side by side."""
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Iterable):
        return tools  # type: ignore[return-value]  # chat.check_tools says what is wrong
    return [
        tool.schema if isinstance(tool, Tool) else function_schema(tool) if callable(tool) else tool
        for tool in tools
    ]


def check_schema(entry: Any, where: str) -> dict[str, Any]:
    """`{"type": "function", "function": {...}}` of an entry that is so, or only its inner part.

    Raises UsageError that begins with `where` and names the field."""
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where}: expected an object, found {type(entry).__name__}")
    if entry.get("type", "function") != "function":
        raise UsageError(f"{where}.type: expected 'function', found {entry['type']!r:.80}")
    inner = entry.get("function", {k: v for k, v in entry.items() if k != "type"})
    at = f"{where}.function" if "function" in entry else where
    if not isinstance(inner, Mapping):
        raise UsageError(f"{at}: expected an object, found {type(inner).__name__}")
    if "function" in entry and (unknown := entry.keys() - {"type", "function"}):
        raise UsageError(f"{where}: unknown field {min(unknown)!r}; expected type and function")
    if unknown := inner.keys() - {"name", "description", "parameters", "strict"}:
        raise UsageError(
            f"{at}: unknown field {min(unknown)!r}; expected name, description and parameters"
        )
    name = inner.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{at}.name: expected up to 64 letters, digits, _ and -, found {name!r}")
    if not isinstance(about := inner.get("description", ""), str):
        raise UsageError(f"{at}.description: expected a text, found {type(about).__name__}")
    parameters = inner.get("parameters", {"type": "object", "properties": {}})
    if problem := schema_problem(parameters):
        raise UsageError(f"{at}.parameters: {problem}")
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise UsageError(f'{at}.parameters: expected a schema of "type": "object"')
    return {"type": "function", "function": dict(inner) | {"parameters": parameters}}


class Toolbox:
    """Some tools, by name. Raises UsageError for two of one name, and for one that is no list."""

    def __init__(self, tools: Sequence[Tool | Callable[..., Any]]):
        if callable(tools) or isinstance(tools, Tool):
            raise UsageError("tools are a list of functions, found a single one")
        if not isinstance(tools, Iterable) or isinstance(tools, (str, Mapping)):
            raise UsageError(f"tools are a list of functions, found {tools!r:.80}")
        self._tools: dict[str, Tool] = {}
        for tool in tools:
            tool = tool if isinstance(tool, Tool) else Tool.of(tool)
            if tool.name in self._tools:
                raise UsageError(f"two tools have the name {tool.name!r}")
            self._tools[tool.name] = tool

    @property
    def schemas(self) -> list[Mapping[str, Any]]:
        return [tool.schema for tool in self._tools.values()]

    def run(self, call: ToolCall) -> ToolResult:
        """Check a call against its schema and run it; a problem is a result, too.

        Raises UsageError where the tool gives what is neither text nor JSON."""
        tool = self._tools.get(call.name)
        if tool is None:
            there = ", ".join(self._tools) or "none"
            return _failed(call, f"there is no tool {call.name!r}; the tools are: {there}")
        if problem := value_problem(call.arguments, tool.parameters):
            return _failed(
                call, f"the arguments of {call.name} are wrong: {problem}; call it again"
            )
        try:
            result = tool.run(call.arguments)
        except ToolError as e:
            return _failed(call, str(e))
        except Exception as e:  # whatever a tool raises is told, to the model and in the result
            return _failed(call, f"{type(e).__name__}: {e}", e)
        if isinstance(result, str):
            return ToolResult(call, result)
        try:
            return ToolResult(call, json.dumps(result, ensure_ascii=False))
        except (TypeError, ValueError) as e:
            raise UsageError(
                f"tool {call.name} gave {type(result).__name__}, which is neither a text nor JSON: "
                f"{e}"
            ) from None


def unreadable(text: str) -> ToolResult:
    """The result of what the model wrote between the tags of a call and is none."""
    inside = re.sub(r"</?tool_call>", "", text).strip()
    try:
        json.loads(inside)
        problem = 'it is not {"name": "...", "arguments": {...}}'
    except (ValueError, RecursionError) as e:
        problem = f"it is not valid JSON: {e}"
    return _failed(
        None,
        f"the tool call could not be read: {problem}; write it again as "
        '{"name": <function-name>, "arguments": <args-json-object>}',
    )


def _failed(call: ToolCall | None, problem: str, error: Exception | None = None) -> ToolResult:
    return ToolResult(call, f"error: {problem}", failed=True, error=error)
