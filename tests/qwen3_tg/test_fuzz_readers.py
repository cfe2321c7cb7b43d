"""Damaged model files, made at random: whatever is in them, `open_checkpoint` gives a checkpoint or
one line that names the file, within seconds and a few megabytes.

The default run is short and always the same. A longer one, with other damage each time, until it
finds something or the time is up:

    python tests/qwen3_tg/test_fuzz_readers.py --minutes 30

It prints the smallest damage that breaks a reader; keep it as a test below."""

from __future__ import annotations

import argparse
import json
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":  # where pytest looks too
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import numpy as np
import pytest
from format_writers import (
    random_model,
    write_awq,
    write_float,
    write_fp8,
    write_gguf,
    write_gptq,
    write_mlx,
)
from gguf_bytes import ARRAY, STRING, File, Raw, small, split
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from qwen3_tg.checkpoint import open_checkpoint
from qwen3_tg.errors import Qwen3Error
from qwen3_tg.tokenizer import Tokenizer

LIMIT_S = 10  # for one file, on a busy machine; a whole one takes milliseconds
LIMIT_BYTES = 8_000_000  # the seeds have at most 300 KB
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 40,
}
Files = dict[str, bytes]
Draw = Callable[[st.SearchStrategy[Any]], Any]

# --- whole models, as the contents of a folder ---


@cache
def seeds() -> dict[str, Files]:
    """Name -> a whole model. `open` is the file to open; the folder where there is none."""
    found = {
        "gguf": {"m.gguf": small().to_bytes()},
        "gguf mixture": {"m.gguf": small(moe=True, tied=True).to_bytes()},
        "gguf parts": {
            f"m-{n + 1:05}-of-00003.gguf": part.to_bytes()
            for n, part in enumerate(split(small(), 3))
        },
    }
    dense, moe = random_model(**SIZES), random_model(moe=True, moe_intermediate_size=64, **SIZES)
    writers: dict[str, Callable[[Path], Any]] = {
        "float": lambda path: write_float(path, *dense, dtype="bfloat16"),
        "shards": lambda path: write_float(path, *moe, dtype="float16", shards=3),
        "awq": lambda path: write_awq(path, *dense, group_size=32),
        "gptq": lambda path: write_gptq(path, *dense, group_size=32, act_order=True),
        "fp8": lambda path: write_fp8(path, *moe),
        "mlx": lambda path: write_mlx(path, *moe, group_size=32),
        "gguf blocks": lambda path: write_gguf(path / "m.gguf", *dense, type_of="Q8_0"),
    }
    for name, write in writers.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            found[name] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return found


GGUF = ["gguf", "gguf mixture", "gguf parts", "gguf blocks"]
SAFETENSORS = ["float", "shards", "awq", "gptq", "fp8", "mlx"]

# --- damage ---

INTERESTING = [0, 1, 2, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
STRANGE_NUMBERS = [0, 1, -1, 2, 3, 10**9, 10**30, 0.5, -0.0, 4.0, 1e308]
STRANGE_NUMBERS += [float("inf"), float("nan"), True, False]
STRANGE_TEXTS = ["", "x", "../x", "\0", "é" * 1000, "\ud800", "qwen3", "yarn", "model.safetensors"]
STRANGE_LISTS = [[], [0], [1, 2], ["x"], [[]], [-1, 8], [2**62, 4]]
STRANGE_OBJECTS = [None, {}, {"x": 1}, {"rope_type": "yarn", "factor": 2}]
STRANGE_JSON = st.sampled_from([*STRANGE_NUMBERS, *STRANGE_TEXTS, *STRANGE_LISTS, *STRANGE_OBJECTS])
STRANGE_VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(n for n in STRANGE_NUMBERS if type(n) is not int or 0 <= n < 2**32),
        *(np.uint64(2**64 - 1), np.int64(-1), np.float64(1e308)),
        *("", "x", "yarn", "gpt2", b"\xff", [], ["a"], ["a", "a"], [""]),
        *(np.zeros(0, np.int32), np.ones(6, np.int32), np.ones(6, np.bool_)),
        *(
            Raw(ARRAY, struct.pack("<IQ", kind, count))
            for kind in (0, STRING, ARRAY, 12)
            for count in (0, 9, 2**61)
        ),
    ]
)


def damage_bytes(content: bytes, draw: Draw) -> bytes:
    """Bytes turned, overwritten, cut, doubled or left out; mostly near the start."""
    if not content:
        return bytes(draw(st.integers(0, 64)))
    ends = st.sampled_from([64, 1024, len(content)])
    at = draw(st.integers(0, min(draw(ends), len(content)) - 1))
    length = draw(st.sampled_from([1, 4, 8, 100]))
    kind = draw(st.sampled_from(["turn", "u32", "u64", "cut", "double", "drop", "zero", "move"]))
    if kind == "turn":
        return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
    if kind in ("u32", "u64"):
        value = draw(st.sampled_from([*INTERESTING, len(content), len(content) - at]))
        new = struct.pack("<I", value % 2**32) if kind == "u32" else struct.pack("<Q", value)
        return content[:at] + new + content[at + len(new) :]
    piece = content[at : at + length]
    there = draw(st.integers(0, len(content)))
    return {
        "cut": content[:at],
        "double": content[:at] + piece + content[at:],
        "drop": content[:at] + content[at + length :],
        "zero": content[:at] + bytes(len(piece)) + content[at + length :],
        "move": content[:there] + piece + content[there:],
    }[kind]


def damage_json(value: Any, draw: Draw) -> Any:
    """One place in a JSON value replaced, taken out, renamed or nested."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        value = deepcopy(value)
        key = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
        what = draw(st.sampled_from(["deeper", "deeper", "deeper", "remove", "rename"]))
        if what == "deeper":
            value[key] = damage_json(value[key], draw)
        elif what == "remove" or isinstance(value, list):
            del value[key]
        else:
            other = draw(st.sampled_from(["x", "../x", *value]))
            value[other] = value.pop(key)
        return value
    if isinstance(value, int | float) and draw(st.booleans()):  # strange, but of the right kind
        return draw(st.sampled_from(STRANGE_NUMBERS))
    return draw(STRANGE_JSON)


def damage_json_file(content: bytes, draw: Draw) -> bytes:
    if draw(st.integers(0, 9)) == 0:
        return damage_bytes(content, draw)
    return json.dumps(damage_json(json.loads(content), draw)).encode()


def damage_safetensors(content: bytes, draw: Draw) -> bytes:
    """Damage to the bytes, or to the header's JSON with its length put right."""
    if draw(st.integers(0, 3)) == 0:
        return damage_bytes(content, draw)
    (length,) = struct.unpack("<Q", content[:8])
    header = damage_json(json.loads(content[8 : 8 + length]), draw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def damage_gguf(file: File, draw: Draw) -> None:
    """A key, a tensor's entry or a count is not what it should be."""
    number = st.sampled_from([0, 1, 4, 8, 31, 32, 64, 2**31, 2**40, 2**62, 2**63, 2**64 - 1])
    what = draw(
        st.sampled_from(["key", "key", "drop", "again", "tensor", "dims", "count", "value"])
    )
    key = draw(st.sampled_from(list(file.keys))) if file.keys else "x"
    tensor = draw(st.sampled_from(file.tensors)) if file.tensors else None
    if what == "key":
        file.keys[key] = draw(STRANGE_VALUES)
    elif what == "value" and isinstance(file.keys.get(key), int):
        file.keys[key] = np.uint64(draw(number))
    elif what == "drop":
        file.keys.pop(key, None)
    elif what == "again":
        file.more_keys.append((key, draw(STRANGE_VALUES)))
    elif what == "count":
        which = draw(st.sampled_from(["key_count", "tensor_count", "version"]))
        setattr(file, which, draw(number) % (2**32 if which == "version" else 2**64))
    elif what == "dims" and tensor:
        tensor.dims = draw(st.lists(number, max_size=5))
    elif what == "tensor" and tensor:
        which = draw(st.sampled_from(["kind", "offset", "name", "remove"]))
        if which == "remove":
            file.tensors.remove(tensor)
        elif which == "name":
            tensor.name = draw(st.sampled_from(["", "x", *(t.name for t in file.tensors)]))
        elif which == "kind":
            tensor.kind = draw(st.integers(0, 45) | number) % 2**32
        else:
            tensor.offset = draw(number)


# --- the property ---


class TooLong(BaseException):
    """Not an Exception, so that no reader swallows it."""


@contextmanager
def within_limits() -> Iterator[None]:
    """Raises TooLong, and AssertionError for too much memory."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TooLong

    old = signal.signal(signal.SIGALRM, stop) if hasattr(signal, "SIGALRM") else None
    if old is not None:
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    tracemalloc.start()
    try:
        yield
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        if old is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
    assert used < LIMIT_BYTES, f"took {used} bytes"


def assert_opens_or_is_refused(files: Files, name: str | None = None) -> str:
    """The line with which it is refused, or "" if it opens: then everything in it can be read."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        try:
            with within_limits():
                checkpoint = open_checkpoint(str(folder / name if name else folder))
        except Qwen3Error as e:
            message = str(e)
            assert message.startswith(temporary), f"names no file: {message}"
            assert len(message.splitlines()) == 1, f"more than a line: {message!r}"
            assert len(message) < 3000, f"{len(message)} characters"
            return message
        shapes = checkpoint.config.weight_shapes()
        assert list(checkpoint.weights) == list(shapes)
        for weight in checkpoint.weights.values():
            for array in weight.arrays.values():
                array.tobytes()
        if checkpoint.tokenizer is not None:
            try:
                Tokenizer(checkpoint.tokenizer).encode("ab <|im_end|>")
            except Qwen3Error as e:
                return str(e)
        return ""


def damaged_gguf_bytes(data: st.DataObject) -> None:
    files = dict(seeds()[data.draw(st.sampled_from(GGUF))])
    opened = data.draw(st.sampled_from(sorted(files)))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(files)))
        files[name] = damage_bytes(files[name], data.draw)
    assert_opens_or_is_refused(files, opened)


def damaged_gguf_entries(data: st.DataObject) -> None:
    whole = small(data.draw(st.booleans()), data.draw(st.booleans()))
    parts = split(whole, 3) if data.draw(st.integers(0, 2)) == 0 else [whole]
    for _ in range(data.draw(st.integers(1, 3))):
        damage_gguf(data.draw(st.sampled_from(parts)), data.draw)
    names = ["m.gguf"]
    if len(parts) > 1:
        names = [f"m-{n + 1:05}-of-00003.gguf" for n in range(3)]
    contents = dict(zip(names, (part.to_bytes() for part in parts), strict=True))
    assert_opens_or_is_refused(contents, data.draw(st.sampled_from(names)))


def damaged_safetensors(data: st.DataObject) -> None:
    files = dict(seeds()[data.draw(st.sampled_from(SAFETENSORS))])
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(files)))
        damage = damage_json_file if name.endswith(".json") else damage_safetensors
        try:
            files[name] = damage(files[name], data.draw)
        except (ValueError, struct.error, RecursionError):  # damaged twice
            files[name] = damage_bytes(files[name], data.draw)
    assert_opens_or_is_refused(files)


def damaged_config(data: st.DataObject) -> None:
    """config.json alone, where most settings are."""
    files = dict(seeds()[data.draw(st.sampled_from(SAFETENSORS))])
    for _ in range(data.draw(st.integers(1, 3))):
        config = json.loads(files["config.json"])
        files["config.json"] = json.dumps(damage_json(config, data.draw)).encode()
    assert_opens_or_is_refused(files)


PROPERTIES = {
    damaged_gguf_bytes: 700,
    damaged_gguf_entries: 900,
    damaged_safetensors: 500,
    damaged_config: 500,
}
SETTINGS = {
    "deadline": None,  # within_limits has one that also ends a loop
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("name", [*GGUF, *SAFETENSORS])
def test_whole_files_open(name: str) -> None:
    files = seeds()[name]
    opened = min(files) if name in GGUF else None
    assert assert_opens_or_is_refused(files, opened) == ""


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_damaged_files_open_or_are_refused(check: Callable[[st.DataObject], None]) -> None:
    run = settings(max_examples=PROPERTIES[check], derandomize=True, **SETTINGS)
    run(given(st.data())(check))()


def test_the_limits_end_a_loop_and_see_memory() -> None:
    if hasattr(signal, "SIGALRM"):
        global LIMIT_S
        LIMIT_S, old = 0.1, LIMIT_S
        try:
            with pytest.raises(TooLong), within_limits():
                while True:
                    pass
        finally:
            LIMIT_S = old
    with pytest.raises(AssertionError, match="took"), within_limits():
        np.zeros(LIMIT_BYTES, np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description="Damage model files at random for a while.")
    parser.add_argument("--minutes", type=float, default=10)
    end = time.monotonic() + 60 * parser.parse_args().minutes
    start = n = time.time_ns() // 10**9
    run = settings(max_examples=1000, phases=[Phase.generate, Phase.shrink], **SETTINGS)
    while time.monotonic() < end:
        for check in PROPERTIES:
            print(f"{check.__name__}, seed {n}", flush=True)
            seed(n)(run(given(st.data())(check)))()
        n += 1
    print(f"nothing found in {(n - start) * 1000 * len(PROPERTIES)} files")


if __name__ == "__main__":
    main()
