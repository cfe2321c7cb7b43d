"""Functions as tools, whose schemas transformers made, too (tools/make_tool_schemas.py)."""

from typing import Any, Literal, Optional, Union


def calculator(expression: str) -> int:
    """Evaluate a math expression.

    Args:
        expression: e.g. 2 + 3
    """
    return len(expression)


def weather(
    city: str,
    days: int = 1,
    unit: Literal["celsius", "fahrenheit"] = "celsius",
    near: Optional[str] = None,  # noqa: UP045 (both spellings are to be read)
) -> dict[str, Any]:
    """Get the weather
    of a city.

    Longer words about it.

    Args:
        city: its name,
            over two lines
        days: how many days
        unit: of temperatures
        near: another city, or none

    Returns:
        what it will be
    """
    return {}


def everything(
    flag: bool,
    ratio: float,
    names: list[str],
    table: dict[str, list[float]],
    either: Union[int, str],  # noqa: UP007
    lists: int | list[int] | None,
    anything: Any,
    bare: list,
    free: dict,
    level: Literal[1, 2, 3],
    taste: str,
) -> None:
    """Take one of each.

    Args:
        flag: a switch
        ratio: a number
        names: some names
        table: rows by name
        either: a number or a text
        lists: one or many
        anything: whatever
        bare: a list
        free: an object
        level: how much
        taste: how it tastes (choices: ["sweet", "sour"])

    Raises:
        ValueError: never
    """


FUNCTIONS = (calculator, weather, everything)
