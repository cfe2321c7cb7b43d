"""--json-schema, --regex and --grammar: the form of an answer, checked before a model loads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen3_tg.errors import UsageError
from qwen3_tg.structured import Constraint


def read_constraint(options: argparse.Namespace) -> Constraint | None:
    """What was asked for, or None. Raises UsageError that names the option and what is wrong."""
    if options.json_schema is not None:
        where = f"--json-schema {options.json_schema}"
        try:
            schema = json.loads(_read(options.json_schema, where))
        except (ValueError, RecursionError) as e:
            raise UsageError(f"{where}: not valid JSON: {e}") from None
        constraint = Constraint.json_schema(schema, where)
    elif options.regex is not None:
        constraint = Constraint.regex(options.regex, "--regex")
    elif options.grammar is not None:
        where = f"--grammar {options.grammar}"
        constraint = Constraint.lark(_read(options.grammar, where), where)
    else:
        return None
    for name in ("stop", "tools"):
        if getattr(options, name):
            raise UsageError(
                f"--{name} would make an answer of another form than --json-schema, --regex and "
                "--grammar ask for: leave one of them away"
            )
    return constraint


def _read(file: str, where: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{where}: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{where}: not valid UTF-8") from None
