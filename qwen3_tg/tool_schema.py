"""A Python function as a tool that a model can call: its signature and docstring as JSON schema.

The docstring is read as transformers' `get_json_schema` reads it: what the function does, and under
`Args:` what each parameter is, with the choices it has, if any, as `(choices: ["a", "b"])`. Unlike
there, `Annotated[str, "what it is"]` says that, too, a parameter's default is told, and one that
may be None says so in JSON Schema's own words.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union

from qwen3_tg.errors import UsageError

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_SUPPORTED = "str, int, float, bool, None, list[...], dict[str, ...], Literal, Optional, a union"
_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*$")
_PARAMETER = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\s*\(choices:\s*(\[.*\])\s*\)\s*$", re.IGNORECASE | re.DOTALL)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """`{"type": "function", "function": {"name", "description", "parameters"}}` of a function.

    Raises UsageError for what is no plain function or method, for one without annotations or
    docstring, and for a type that JSON has not."""
    if _is_async(function):
        raise UsageError(
            f"tool {getattr(function, '__name__', function)!s:.80} is async, which no tool can be; "
            "write a plain function that waits for it, such as by asyncio.run()"
        )
    if not _is_plain(function):
        raise UsageError(
            "a tool must be a plain function with annotations and a docstring, found "
            f"{function!r:.80}; write one that calls it"
        )
    name = function.__name__
    try:
        hints = typing.get_type_hints(function)
        annotations = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError) as e:
        raise UsageError(f"tool {name}: its annotations cannot be resolved: {e}") from None
    about, abouts = parse_docstring(inspect.getdoc(function) or "")
    if not about:
        raise UsageError(f"tool {name} has no docstring: say there what it does, for the model")
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        where = f"tool {name}, parameter {parameter.name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(f"{where}: a tool takes its arguments by name, found {parameter}")
        if parameter.name not in hints:
            raise UsageError(f"{where}: no type annotation; expected {_SUPPORTED}")
        annotated = _annotated_text(annotations[parameter.name])
        if parameter.name not in abouts and not annotated:
            raise UsageError(
                f"{where}: the docstring does not describe it under `Args:`, nor does its "
                'annotation, as Annotated[str, "what it is"] would'
            )
        properties[parameter.name] = _described(
            type_schema(hints[parameter.name], where),
            abouts.get(parameter.name) or annotated,
            where,
        )
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            properties[parameter.name]["default"] = _default(parameter.default, where)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    described = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": described}


def _is_plain(function: Any) -> bool:
    """Whether it is a function or method, perhaps in a decorator that says which. A
    functools.partial is none: its signature still has the parameters that it fills in."""
    if not callable(function) or isinstance(function, (type, functools.partial)):
        return False
    inner = inspect.unwrap(function)
    return inspect.isfunction(inner) or inspect.ismethod(inner)


def _is_async(function: Any) -> bool:
    if not callable(function):
        return False
    inner = inspect.unwrap(function)
    return inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner)


def _annotated_text(annotation: Any) -> str:
    """The first text of `Annotated[...]`, or "" where there is none."""
    if typing.get_origin(annotation) is not Annotated:
        return ""
    return next((text for text in annotation.__metadata__ if isinstance(text, str)), "")


def type_schema(annotation: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type. Raises UsageError for one that has none; `where` is for it."""
    if annotation is Any:
        return {}
    if annotation in _TYPES:
        return {"type": _TYPES[annotation]}
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is list or origin is list:
        return {"type": "array"} | ({"items": type_schema(of[0], where)} if of else {})
    if annotation is dict or (origin is dict and of[0] is str):
        schema: dict[str, Any] = {"type": "object"}
        return schema | ({"additionalProperties": type_schema(of[1], where)} if of else {})
    if origin is Literal:
        kinds = list(dict.fromkeys(_TYPES.get(type(value), "") for value in of))
        if "" in kinds:
            raise UsageError(f"{where}: {annotation} has values that JSON has not")
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(of)}
    if origin in (Union, types.UnionType):
        return _any_of([type_schema(one, where) for one in of])
    shown = inspect.formatannotation(annotation)
    raise UsageError(f"{where}: type {shown} is not supported; expected {_SUPPORTED}")


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if {} in schemas:  # Any
        return {}
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def _described(schema: dict[str, Any], about: str, where: str) -> dict[str, Any]:
    if choices := _CHOICES.search(about):
        try:
            schema = schema | {"enum": json.loads(choices[1])}
        except json.JSONDecodeError as e:
            raise UsageError(f"{where}: its choices are not a JSON list: {e}") from None
        about = about[: choices.start()]
    return schema | {"description": about}


def _default(value: Any, where: str) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise UsageError(f"{where}: its default {value!r:.80} is nothing JSON has: {e}") from None


def parse_docstring(text: str) -> tuple[str, dict[str, str]]:
    """What it does, and what each parameter is, of a docstring in Google's style without its
    indentation (`inspect.getdoc`)."""
    about: list[str] = []
    abouts: dict[str, str] = {}
    section, indent, name = "", None, ""
    for line in text.splitlines():
        if found := _SECTION.match(line):
            section, indent, name = found[1], None, ""
        elif not section:
            about.append(line)
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            depth = len(line) - len(line.lstrip())
            indent = depth if indent is None else indent  # that of the first parameter
            if depth <= indent and (found := _PARAMETER.match(line.strip())):
                name, abouts[found[1]] = found[1], found[2]
            elif name:
                abouts[name] = f"{abouts[name]} {line.strip()}".strip()
    return "\n".join(about).strip(), abouts
