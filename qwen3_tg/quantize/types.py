"""Which tensor of a GGUF file has which type: the names that llama.cpp's users know."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from qwen3_tg.checkpoint.gguf_names import layer_and_kind, tensor_name
from qwen3_tg.checkpoint.types import StoredWeight
from qwen3_tg.quantize.blocks import FLOATS, block_size, row_bytes

# What can be asked for -> (the type of most matrices, llama.cpp's number of such files). The mixes
# of Q4_K and Q5_K with Q6_K are llama.cpp's _M; its plain K-quants are its _S.
CHOICES = {
    "q8_0": ("Q8_0", 7),
    "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3),
    "q5_0": ("Q5_0", 8),
    "q5_1": ("Q5_1", 9),
    "iq4_nl": ("IQ4_NL", 25),
    "q2_k": ("Q2_K", 10),
    "q3_k": ("Q3_K", 11),
    "q4_k": ("Q4_K", 14),
    "q5_k": ("Q5_K", 16),
    "q6_k": ("Q6_K", 18),
    "q4_k_m": ("Q4_K", 15),
    "q5_k_m": ("Q5_K", 17),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "f32": ("F32", 0),
}
MIXES = ("q4_k_m", "q5_k_m")
# For rows that are no whole blocks, as llama.cpp does it (src/llama-quant.cpp); from there F16.
_NEXT = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write: `name` is the checkpoint's, `kind` GGUF's without layer (attn_q).
    `is_kept`: norms and routers are F32 whatever the choice."""

    name: str
    kind: str
    gguf_name: str
    type: str
    stored: StoredWeight
    is_kept: bool

    @property
    def nbytes(self) -> int:
        """Bytes in the file that is written."""
        *rows, inputs = self.stored.shape
        return math.prod(rows) * row_bytes(inputs, self.type)


def choose_types(
    weights: Mapping[str, StoredWeight], choice: str, embeddings: str | None, layers: int
) -> tuple[list[Tensor], list[str]]:
    """Every tensor with its type, and what the user should know.

    `choice` is a key of CHOICES; `embeddings` too, but no mix: the type of token_embd and output.
    By default token_embd has the type of the others, and output, or token_embd where it is both,
    Q6_K unless that is less than the others have, as in llama.cpp."""
    tensors: list[Tensor] = []
    changed: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    for name, stored in weights.items():
        layer, kind = layer_and_kind(name)
        wanted = _wanted(kind, layer, layers, choice, embeddings, "lm_head.weight" not in weights)
        is_kept = len(stored.shape) == 1 or kind == "ffn_gate_inp"
        type = "F32" if is_kept else _fitting(wanted, stored.shape[-1])
        if type != wanted and not is_kept:
            changed[wanted, type, stored.shape[-1]].add(kind)
        tensors.append(Tensor(name, kind, tensor_name(name), type, stored, is_kept))
    notes = [
        f"{', '.join(sorted(kinds))}: rows of {inputs} are no whole blocks of {wanted} "
        f"({block_size(wanted)}): {type} instead"
        for (wanted, type, inputs), kinds in changed.items()
    ]
    return tensors, notes


def _wanted(
    kind: str, layer: int | None, layers: int, choice: str, embeddings: str | None, tied: bool
) -> str:
    base, _ = CHOICES[choice]
    if kind in ("token_embd", "output") and embeddings:
        return CHOICES[embeddings][0]
    if kind == "output" or (kind == "token_embd" and tied):
        return base if base in (*FLOATS, "Q8_0") else "Q6_K"
    if choice in MIXES and kind in ("attn_v", "ffn_down", "ffn_down_exps"):
        assert layer is not None
        return "Q6_K" if _has_more_bits(layer, layers) else base
    return base


def _has_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth of the layers, and every third."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(type: str, inputs: int) -> str:
    while inputs % block_size(type):
        type = _NEXT.get(type, "F16")
    return type
