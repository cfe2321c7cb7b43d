"""JSON schemas, checked before they are used: what is wrong with one, or with a value it describes.

The work is the library jsonschema's. Nothing is ever fetched: a schema that refers to another
document is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Problems of one value that are told; the first ones say enough to repair it.
_MOST_TOLD = 5


def schema_problem(schema: Any) -> str | None:
    """Where a JSON schema itself is wrong and how, or None. A boolean is a schema, too."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, (Mapping, bool)):
        return f"a JSON schema is an object, found {type(schema).__name__}"
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as e:
        return f"{_place(e.absolute_path)}: {e.message:.300}"
    except RecursionError:
        return "nested too deeply"
    for place, target in _references(schema, "$"):
        if not _leads_somewhere(schema, target):
            return (
                f"{place}: $ref {target!r} leads nowhere; expected '#/...', a place in this schema"
            )
    return None


def value_problem(value: Any, schema: Mapping[str, Any]) -> str | None:
    """How a value breaks a schema that has no problem itself, place by place, or None."""
    from jsonschema import Draft202012Validator
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    validator = Draft202012Validator(schema, registry=Registry())  # one that fetches nothing
    try:
        errors = sorted(validator.iter_errors(value), key=lambda e: list(map(str, e.absolute_path)))
    except (RecursionError, ArithmeticError, Unresolvable) as e:  # a circle, a number of 400 digits
        return f"$: cannot be checked: {type(e).__name__} {e!s:.100}"
    if not errors:
        return None
    told = [f"{_place(e.absolute_path)}: {e.message:.300}" for e in errors[:_MOST_TOLD]]
    if more := len(errors) - len(told):
        told.append(f"and {more} more")
    return "; ".join(told)


def _place(path: Any) -> str:
    """`$.cities[0].name`, as JSONPath writes it."""
    return "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def _references(schema: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every $ref with its place; the values of `enum`, `default` and the like are no schemas."""
    if isinstance(schema, Mapping):
        for key in ("$ref", "$dynamicRef"):
            if isinstance(target := schema.get(key), str):
                yield place, target
        if place != "$" and isinstance(id := schema.get("$id"), str):
            yield place, id  # another document within this one: references would mean that
        for key, value in schema.items():
            if key not in ("enum", "const", "default", "examples"):
                yield from _references(value, f"{place}.{key}")
    elif isinstance(schema, list):
        for n, value in enumerate(schema):
            yield from _references(value, f"{place}[{n}]")


def _leads_somewhere(schema: Any, target: str) -> bool:
    if target != "#" and not target.startswith("#/"):
        return False
    for part in target.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and part.isdigit() and int(part) < len(schema):
            schema = schema[int(part)]
        elif isinstance(schema, Mapping) and part in schema:
            schema = schema[part]
        else:
            return False
    return isinstance(schema, (Mapping, bool))
