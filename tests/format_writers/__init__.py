"""Writers of every checkpoint format, to test readers with: from one random float model they make
the files that people have, and give back what is in them.

Each writer returns the weights that its files stand for, dequantised to float32 by their Hugging
Face names: a float32 checkpoint of those (`write_float`) must give the same logits. They share no
code with the product or the reference: only numpy, ml_dtypes, safetensors and gguf.
"""

from format_writers.gguf_blocks import BLOCK_TYPES, TABLE_TYPES, dequantise, quantise
from format_writers.gguf_file import gguf_name, gguf_parts, write_gguf
from format_writers.model import (
    Config,
    Weights,
    is_linear,
    random_model,
    write_float,
    write_safetensors,
)
from format_writers.packed import write_awq, write_fp8, write_gptq, write_mlx

__all__ = [
    "BLOCK_TYPES",
    "TABLE_TYPES",
    "Config",
    "Weights",
    "dequantise",
    "gguf_name",
    "gguf_parts",
    "is_linear",
    "quantise",
    "random_model",
    "write_awq",
    "write_float",
    "write_fp8",
    "write_gguf",
    "write_gptq",
    "write_mlx",
    "write_safetensors",
]
