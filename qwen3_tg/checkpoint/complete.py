"""One error for all the weights that do not fit, whatever the format."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_tg.errors import CheckpointError

_MAX_LISTED = 8  # problems named in one error


def refuse_misfits(problems: Sequence[str], where: str, against: str = "config.json") -> None:
    """Raises CheckpointError that lists the first problems, if there are any. `against` is what
    says which weights there must be."""
    if problems:
        more = len(problems) - _MAX_LISTED
        raise CheckpointError(
            f"{where}: the weights do not fit {against}: {'; '.join(problems[:_MAX_LISTED])}"
            f"{f'; and {more} more' if more > 0 else ''}"
        )
