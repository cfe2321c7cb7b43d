"""GGUF files byte by byte, whole or damaged, written from the format's description.

A `File` is plain data to change before `to_bytes`; nothing in it needs to be right."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

F32, F16, Q8_0, BF16 = 0, 1, 8, 30
NUMBERS = {
    "|u1": 0,
    "|i1": 1,
    "<u2": 2,
    "<i2": 3,
    "<u4": 4,
    "<i4": 5,
    "<f4": 6,
    "|b1": 7,
    "<u8": 10,
    "<i8": 11,
    "<f8": 12,
}
STRING, ARRAY = 8, 9
VOCAB, D, F, H, K, HD, E = 10, 8, 12, 2, 1, 4, 3  # of `small`


@dataclass
class Raw:
    """A value as its type and bytes."""

    kind: int
    content: bytes


@dataclass
class Tensor:
    """`dims` are innermost first, as in the file."""

    name: str
    dims: Sequence[int]
    kind: int = F32
    offset: int = 0


@dataclass
class File:
    keys: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    more_keys: list[tuple[str, Any]] = field(default_factory=list)
    tensor_count: int | None = None
    key_count: int | None = None

    def to_bytes(self) -> bytes:
        keys = [*self.keys.items(), *self.more_keys]
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(keys) if self.key_count is None else self.key_count,
        )
        head = self.magic + struct.pack("<IQQ", self.version, *counts)
        for key, value in keys:
            head += string(key) + typed(value)
        for t in self.tensors:
            head += string(t.name) + struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *t.dims)
            head += struct.pack("<IQ", t.kind, t.offset)
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def place(self) -> File:
        """Put float32 tensors one behind the other, filled with numbers of their own."""
        data = b""
        for n, tensor in enumerate(self.tensors):
            tensor.offset = len(data)
            data += np.full(int(np.prod(tensor.dims)), n + 1, "<f4").tobytes()
            data += bytes(-len(data) % self.alignment)
        self.data = data
        return self


def string(text: str | bytes) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def typed(value: Any) -> bytes:
    """A value behind its type; ints become u32, floats f32."""
    if isinstance(value, Raw):
        return struct.pack("<I", value.kind) + value.content
    if isinstance(value, str | bytes):
        return struct.pack("<I", STRING) + string(value)
    if isinstance(value, list):
        body = b"".join(map(string, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + body
    if isinstance(value, np.ndarray):
        head = struct.pack("<IIQ", ARRAY, NUMBERS[value.dtype.str], len(value))
        return head + value.tobytes()
    default = {bool: np.bool_, int: np.uint32, float: np.float32}.get(type(value))
    with np.errstate(over="ignore"):
        number = default(value) if default else value
    return struct.pack("<I", NUMBERS[number.dtype.str]) + number.tobytes()


def small(moe: bool = False, tied: bool = False) -> File:
    """A model of one layer with a tokenizer of five tokens."""
    A = "qwen3moe" if moe else "qwen3"
    keys: dict[str, Any] = {
        "general.architecture": A,
        "general.name": "small",
        f"{A}.block_count": 1,
        f"{A}.context_length": 64,
        f"{A}.embedding_length": D,
        f"{A}.feed_forward_length": F,
        f"{A}.attention.head_count": H,
        f"{A}.attention.head_count_kv": K,
        f"{A}.attention.key_length": HD,
        f"{A}.attention.value_length": HD,
        f"{A}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{A}.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<|im_end|>", "<think>", "[PAD5]"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3, 4, 5], np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    sizes: dict[str, Sequence[int]] = {
        "token_embd": (D, VOCAB),
        "blk.0.attn_norm": (D,),
        "blk.0.attn_q": (D, H * HD),
        "blk.0.attn_k": (D, K * HD),
        "blk.0.attn_v": (D, K * HD),
        "blk.0.attn_output": (H * HD, D),
        "blk.0.attn_q_norm": (HD,),
        "blk.0.attn_k_norm": (HD,),
        "blk.0.ffn_norm": (D,),
        "output_norm": (D,),
    }
    if moe:
        keys |= {
            f"{A}.expert_count": E,
            f"{A}.expert_used_count": 2,
            f"{A}.expert_feed_forward_length": F,
        }
        sizes |= {
            "blk.0.ffn_gate_inp": (D, E),
            "blk.0.ffn_gate_exps": (D, F, E),
            "blk.0.ffn_up_exps": (D, F, E),
            "blk.0.ffn_down_exps": (F, D, E),
        }
    else:
        sizes |= {"blk.0.ffn_gate": (D, F), "blk.0.ffn_up": (D, F), "blk.0.ffn_down": (F, D)}
    if not tied:
        sizes["output"] = (D, VOCAB)
    return File(keys, [Tensor(f"{name}.weight", dims) for name, dims in sizes.items()]).place()


def split(file: File, parts: int) -> list[File]:
    """The parts of a model, the first with all metadata."""
    found = []
    for n in range(parts):
        own = {
            "split.no": np.uint16(n),
            "split.count": np.uint16(parts),
            "split.tensors.count": np.int32(len(file.tensors)),
        }
        keys = file.keys | own if n == 0 else own
        found.append(File(keys, file.tensors[n::parts]).place())
    return found


def write_parts(folder: Path, files: Sequence[File], name: str = "m") -> list[Path]:
    return [
        file.write(folder / f"{name}-{n + 1:05}-of-{len(files):05}.gguf")
        for n, file in enumerate(files)
    ]
