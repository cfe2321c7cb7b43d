"""Write a random checkpoint in the shape of a released Qwen3, to measure memory and speed with.

    python tools/make_random.py --shape Qwen3-0.6B --out DIR
    python tools/make_random.py --shape Qwen3-30B-A3B --out DIR --layers 4 --experts 32

DIR is a complete Hugging Face directory: config.json, generation_config.json, tokenizer_config.json
with the chat template, tokenizer.json and safetensors files. What the model writes is noise, but
its activations and logits have the sizes of a real one's. A tied lm_head.weight is not stored.

Values are drawn and written a few million at a time, so the process stays small whatever the model.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DATA = Path(__file__).parent.parent / "tests" / "data"
TYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
DRAWN_AT_ONCE = 1 << 22  # values: 16 MiB in float32
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    shapes = released_shapes()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", required=True, choices=shapes, help="the released model")
    parser.add_argument("--out", required=True, type=Path, help="folder to write, new or empty")
    parser.add_argument("--dtype", default="bfloat16", choices=TYPES)
    parser.add_argument("--layers", type=int, help="instead of the released number")
    parser.add_argument("--experts", type=int, help="a layer, instead of the released number")
    parser.add_argument("--shard-gb", type=float, default=4, help="size of a file; 0: one file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    released = shapes[args.shape]
    config = {k: v for k, v in released.items() if k not in ("generation_config", "_meta")}
    config["torch_dtype"] = args.dtype
    if args.layers is not None:
        if args.layers < 1:
            parser.error(f"--layers must be at least 1, found {args.layers}")
        config["num_hidden_layers"] = args.layers
    if args.experts is not None:
        if "num_experts" not in config:
            parser.error(f"--experts: {args.shape} has no experts")
        if args.experts < config["num_experts_per_tok"]:
            parser.error(
                f"--experts must be at least {config['num_experts_per_tok']}, the number used for "
                f"each token, found {args.experts}"
            )
        config["num_experts"] = args.experts
    if args.shard_gb < 0:
        parser.error(f"--shard-gb must not be negative, found {args.shard_gb}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"--out {args.out} exists and is not an empty folder")
    args.out.mkdir(parents=True, exist_ok=True)
    needed, free = size_bytes(config), shutil.disk_usage(args.out).free
    if needed > free:
        parser.exit(1, f"error: needs {needed / 1e9:.1f} GB, {args.out} has {free / 1e9:.1f} GB\n")

    write_weights(config, args.out, int(args.shard_gb * 1e9), args.seed)
    write_json(args.out / "config.json", config)
    write_json(args.out / "generation_config.json", released["generation_config"])
    write_tokenizer(config, released["_meta"], args.out)


def released_shapes() -> dict[str, dict[str, Any]]:
    """Model name -> the fields of config.json, with generation_config and _meta beside them."""
    shapes: dict[str, dict[str, Any]] = json.loads(
        (DATA / "qwen3_configs.json").read_text(encoding="utf-8")
    )
    return shapes


def tensor_shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor that the checkpoint stores, in the order of its files."""
    D, Hd = config["hidden_size"], config["head_dim"]
    V, H, K = config["vocab_size"], config["num_attention_heads"], config["num_key_value_heads"]

    def mlp(prefix: str, F: int) -> Shapes:
        return {
            f"{prefix}.gate_proj.weight": (F, D),
            f"{prefix}.up_proj.weight": (F, D),
            f"{prefix}.down_proj.weight": (D, F),
        }

    shapes: Shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.self_attn.q_proj.weight": (H * Hd, D),
            f"{layer}.self_attn.k_proj.weight": (K * Hd, D),
            f"{layer}.self_attn.v_proj.weight": (K * Hd, D),
            f"{layer}.self_attn.o_proj.weight": (D, H * Hd),
            f"{layer}.self_attn.q_norm.weight": (Hd,),
            f"{layer}.self_attn.k_norm.weight": (Hd,),
            f"{layer}.post_attention_layernorm.weight": (D,),
        }
        if "num_experts" in config:  # in every released mixture, all layers are mixtures
            shapes[f"{layer}.mlp.gate.weight"] = (config["num_experts"], D)
            for e in range(config["num_experts"]):
                shapes |= mlp(f"{layer}.mlp.experts.{e}", config["moe_intermediate_size"])
        else:
            shapes |= mlp(f"{layer}.mlp", config["intermediate_size"])
    shapes["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def size_bytes(config: dict[str, Any]) -> int:
    width = TYPES[config["torch_dtype"]][1]
    return sum(math.prod(shape) for shape in tensor_shapes(config).values()) * width


def write_weights(config: dict[str, Any], folder: Path, shard_bytes: int, seed: int = 0) -> None:
    """model.safetensors, or files of at most `shard_bytes` (0: no limit) with their index.

    A tensor that is larger than that has a file of its own."""
    rng = np.random.default_rng(seed)
    dtype = config["torch_dtype"]
    shards = list(_shards(tensor_shapes(config), shard_bytes, TYPES[dtype][1]))
    total = size_bytes(config)
    weight_map: dict[str, str] = {}
    written = 0
    for number, shapes in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        with (folder / name).open("wb") as file:
            written += _write_header(file, shapes, dtype)
            for shape in shapes.values():
                for values in _drawn(rng, shape):
                    _stored(values, dtype).tofile(file)
        print(f"{name}: {written / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(config: dict[str, Any], meta: dict[str, Any], folder: Path) -> None:
    """tokenizer.json as released; tokenizer_config.json with what is read of it."""
    with lzma.open(DATA / "tokenizer.json.xz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    texts = {
        "add_bos_token": False,
        "bos_token": None,
        "chat_template": (DATA / meta["chat_template_file"]).read_text(encoding="utf-8"),
        "eos_token": "<|im_end|>",
        "model_max_length": meta["tokenizer_model_max_length"] or config["max_position_embeddings"],
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", texts)


def write_json(file: Path, fields: dict[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _shards(shapes: Shapes, shard_bytes: int, width: int) -> Iterator[Shapes]:
    shard: Shapes = {}
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * width
        if shard and shard_bytes and used + size > shard_bytes:
            yield shard
            shard, used = {}, 0
        shard[name] = shape
        used += size
    yield shard


def _write_header(file: BinaryIO, shapes: Shapes, dtype: str) -> int:
    """The length of the header in 8 bytes, and the header: where each tensor begins and ends after
    it. Gives how many bytes of tensors are to follow."""
    kind, width = TYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    file.write(len(text).to_bytes(8, "little") + text)
    return end


def _drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The values in parts. Norms lie about one; a matrix keeps the size of what it is given.

    Uniform: drawn several times faster than normal ones."""
    is_norm = len(shape) == 1
    deviation = 0.1 if is_norm else shape[-1] ** -0.5
    width = np.float32(deviation * 12**0.5)  # of a uniform distribution with that deviation
    lowest = np.float32(is_norm) - width / 2
    left = math.prod(shape)
    while left:
        count = min(left, DRAWN_AT_ONCE)
        values = rng.random(count, dtype=np.float32)
        values *= width
        values += lowest
        yield values
        left -= count


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it lies in the file; bfloat16 is its upper half."""
    if dtype == "bfloat16":
        return (values.view("<u4") >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "float16" else "<f4")


if __name__ == "__main__":
    main()
