"""Names that devices and their types go by. Knows nothing of tinygrad.

Several devices that compute together go by one name too, with commas: CUDA,CUDA:1.
"""

import re

DTYPE_NAMES = ("float32", "float16", "bfloat16")
# What keys and values can be kept in. int8 is read and written as integers with float32 scales, so
# that every device has it.
KV_DTYPE_NAMES = (*DTYPE_NAMES, "int8")
# How a CPU computes: "fast" and "exact" by its own kernels (backends/qwen3_tg_cpu), "exact" without
# rounding activations to 16 bits, "generic" by tinygrad's lowering, as every other device does.
KERNELS = ("fast", "exact", "generic")


def family(name: str) -> str:
    """CUDA, of CUDA:1 and of CUDA,CUDA:1"""
    return re.split("[:,]", name)[0]


def each(name: str) -> tuple[str, ...]:
    """CUDA and CUDA:1, of CUDA,CUDA:1"""
    return tuple(name.split(","))


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 // 10 else f"{nbytes / 2**20:.1f} MiB"


def one_line(e: BaseException) -> str:
    """Of a driver's error, what fits in a line."""
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]
