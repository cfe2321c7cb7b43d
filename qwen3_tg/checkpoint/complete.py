"""Whether the tensors that are there are those of the model, whatever the format."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3_tg.errors import CheckpointError

_MAX_LISTED = 8  # problems named in one error


def refuse_absent_layers(layers: int, tensor_count: int, where: str) -> None:
    """Raises CheckpointError if there are fewer tensors than layers: to call before anything is
    made for each layer, of which a damaged file may announce billions."""
    if layers > tensor_count:
        raise CheckpointError(
            f"{where}: {layers} layers are announced, but there are only {tensor_count} tensors; "
            "is the download complete?"
        )


def refuse_misfits(problems: Sequence[str], where: str, against: str = "config.json") -> None:
    """Raises CheckpointError that lists the first problems, if there are any. `against` is what
    says which weights there must be."""
    if problems:
        more = len(problems) - _MAX_LISTED
        raise CheckpointError(
            f"{where}: the weights do not fit {against}: {'; '.join(problems[:_MAX_LISTED])}"
            f"{f'; and {more} more' if more > 0 else ''}"
        )
