"""Names around GGUF: of tensors inside a file; and of files, which say the type of the weights and
which files are parts of one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from qwen3_tg.errors import CheckpointError

# Hugging Face's module, without its layer -> GGUF's kind of tensor
_KINDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_TYPE = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q[1-8](?:_[0-9A-Z]+)*|TQ[12]_0|MXFP4(?:_MOE)?|BF16|FP?16|FP?32))$",
    re.IGNORECASE,
)
_NO_MODEL = ("mmproj", "imatrix")


def gguf_models(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among the names of a folder's files: their type (Q4_K_M, BF16 ...) -> their files,
    parts in order. A name without a type, or with that of another model, stands for itself."""
    models: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        folder, slash, file = name.rpartition("/")
        if file.lower().endswith(".gguf") and not file.lower().startswith(_NO_MODEL):
            models[folder + slash + _PART.sub("", file[: -len(".gguf")])].append(name)
    by_type: dict[str, list[str]] = defaultdict(list)
    for model in models:
        match = _TYPE.search(model)
        by_type[match[1].upper() if match else model].append(model)
    return {
        (kind if len(same) == 1 else model): models[model]
        for kind, same in by_type.items()
        for model in same
    }


def choose_gguf(names: Iterable[str], kind: str, where: str) -> list[str]:
    """The files of the model with this type, all parts in order.

    Raises CheckpointError listing the types there are."""
    models = gguf_models(names)
    wanted = kind.lower()
    found = [k for k in models if k.lower() == wanted]
    found = found or [k for k in models if k.lower().endswith(f"-{wanted}")]  # UD-Q4_K_XL
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: no GGUF of type {kind!r}; there are {', '.join(models) or 'none'}"
        )
    files = models[found[0]]
    last = _PART.search(files[-1][: -len(".gguf")])
    if (int(last[2]) if last else 1) != len(files):
        raise CheckpointError(
            f"{where}: {found[0]} has {len(files)} of its {int(last[2]) if last else 1} parts"
        )
    return files


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """A tensor's name in Hugging Face's words -> its layer, None outside of them, and what GGUF
    calls its kind (attn_q)."""
    module = name.removesuffix(".weight")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return (int(match[1]), _KINDS[match[2]]) if match else (None, _KINDS[module])


def tensor_name(name: str) -> str:
    """A tensor's name in a GGUF file, from Hugging Face's."""
    layer, kind = layer_and_kind(name)
    return f"{kind}.weight" if layer is None else f"blk.{layer}.{kind}.weight"
