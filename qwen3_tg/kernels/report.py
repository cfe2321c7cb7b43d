"""What `qwen3 kernels` found, for reading: one page of HTML with the sources side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen3_tg.kernels.lower import Kernel


@dataclass(frozen=True)
class Column:
    """One target (or the device that is here) with its kernels. `outcome` is what happened to them:
    "ran", "compiled by ...", "lowered"; `problems` are those of kernels that did not compile, by
    their number."""

    name: str
    language: str
    types: str
    kernels: Sequence[Kernel]
    outcome: str
    problems: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One step of one phase: its kernels in each column, in the columns' order."""

    phase: str
    step: str
    kernels: list[list[Kernel]]


def rows(columns: Sequence[Column]) -> list[Row]:
    """Steps in the order of the first column; those that only others have come after."""
    keys = dict.fromkeys((k.phase, k.step) for column in columns for k in column.kernels)
    ordered = sorted(keys, key=lambda key: key[0] != columns[0].kernels[0].phase)
    return [
        Row(
            phase,
            step,
            [
                [k for k in column.kernels if (k.phase, k.step) == (phase, step)]
                for column in columns
            ],
        )
        for phase, step in ordered
    ]


def html(title: str, columns: Sequence[Column], bandwidth: float | None) -> str:
    """The page. `bandwidth` in bytes a second is that of a measured copy."""
    import jinja2

    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=title, columns=columns, rows=rows(columns), bandwidth=bandwidth
    )
