"""Stored tensors to the weights of the model: which tensors make up which matrix.

A weight is an array as stored (float32, float16, or the bits of bfloat16) or a Packed matrix; one
name, one weight, by the names of Hugging Face, each expert on its own. All that does not fit is
reported in one error. Knows nothing of bytes in files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from qwen3_tg_numpy.config import CheckpointError
from qwen3_tg_numpy.quantised import FLOATS, Layout, Packed, Parts, Scheme, Shape
from qwen3_tg_numpy.safetensors_file import dtype_name, read_directory

Stored = np.ndarray | Packed


def read_weights(
    path: Path, shapes: Mapping[str, Shape], scheme: Scheme | None = None
) -> dict[str, Stored]:
    """The weights of a model directory that `shapes` names, in its order. Nothing is decoded.

    A stored lm_head that `shapes` does not name (tied embeddings) is left out. Raises
    CheckpointError for a damaged file, and one for all tensors that do not fit."""
    stored, problems = read_directory(path)
    weights: dict[str, Stored] = {}
    left = unstack(stored)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        packing = scheme.of(module) if scheme and f"{module}.{scheme.marker}" in left else None
        if packing and len(shape) == 2:
            layout = packing.layout(shape)
            parts = {end: left.pop(f"{module}.{end}", None) for end in layout}
            found = {end: array for end, array in parts.items() if array is not None}
            problems += _wrong_parts(module, layout, found)
            weights[name] = Packed(shape, partial(packing.decode, found, shape))
        elif name in left:
            array = left.pop(name)
            if (dtype := dtype_name(array)) not in FLOATS:
                problems.append(f"{name}: expected {' or '.join(FLOATS)}, found {dtype}")
            weights[name] = array
    if "lm_head.weight" not in shapes:
        left = {name: array for name, array in left.items() if not name.startswith("lm_head.")}
    problems += [f"unexpected {name}" for name in left]
    return fit(weights, shapes, problems, str(path))


def fit(
    weights: Mapping[str, Stored], shapes: Mapping[str, Shape], problems: list[str], where: str
) -> dict[str, Stored]:
    """The weights in the order of `shapes`. Raises one CheckpointError for the problems so far and
    for what is missing or misshapen."""
    missing = [f"missing {name}" for name in shapes if name not in weights]
    misshapen = [
        f"{name}: expected shape {shape}, found {weights[name].shape}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if problems := missing + problems + misshapen:
        raise CheckpointError(
            f"{where}: weights do not fit the config:\n  " + "\n  ".join(problems)
        )
    return {name: weights[name] for name in shapes}


def unstack(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each expert's part of the stacked tensors that MLX has, by its own name."""
    result: dict[str, np.ndarray] = {}
    for name, array in stored.items():
        if ".mlp.switch_mlp." in name and array.ndim:
            for e, expert in enumerate(array):
                result[name.replace(".switch_mlp.", f".experts.{e}.")] = expert
        else:
            result[name] = array
    return result


def _wrong_parts(module: str, layout: Layout, parts: Parts) -> list[str]:
    """What is wrong with the tensors of one packed matrix."""
    wrong = []
    for end, (dtypes, expected) in layout.items():
        if end not in parts:
            wrong += [] if end == "g_idx" else [f"missing {module}.{end}"]
        elif parts[end].shape != expected:
            wrong.append(f"{module}.{end}: expected shape {expected}, found {parts[end].shape}")
        elif (dtype := dtype_name(parts[end])) not in dtypes:
            wrong.append(f"{module}.{end}: expected {' or '.join(dtypes)}, found {dtype}")
        elif end == "g_idx":
            low, high, groups = parts[end].min(), parts[end].max(), len(parts["scales"])
            if low < 0 or high >= groups:
                wrong.append(
                    f"{module}.{end}: expected groups 0 to {groups - 1}, found {low} to {high}"
                )
    return wrong
