"""Run by test_emulated.py in a process of its own, whose DEV is tinygrad's emulator in Python with
the tensor cores of a GPU: logits of a checkpoint in half precision, as JSON on stdout."""

from __future__ import annotations

import json
import sys

from qwen3_tg import compiler

compiler.prepare_environment()

from tinygrad import Tensor, UOp, dtypes  # noqa: E402
from tinygrad.codegen import to_program_cache  # noqa: E402

from qwen3_tg.checkpoint import open_checkpoint  # noqa: E402
from qwen3_tg.kv_cache import KVCache  # noqa: E402
from qwen3_tg.linear import to_device  # noqa: E402
from qwen3_tg.model import Qwen3  # noqa: E402
from qwen3_tg.rope import rope_table  # noqa: E402

LIMIT = 64


def main() -> None:
    path, ids = sys.argv[1], json.loads(sys.argv[2])
    found = open_checkpoint(path)
    native = frozenset({"float32", "float16"})
    weights = {name: to_device(w, "PYTHON", native) for name, w in found.weights.items()}
    rope = Tensor(rope_table(found.config, LIMIT), device="PYTHON").realize()
    model = Qwen3(found.config, weights, rope, dtypes.float16)
    cache = KVCache(found.config, LIMIT, dtypes.float16, "PYTHON")
    rows = []
    for start, end in ((0, len(ids) - 1), (len(ids) - 1, len(ids))):  # a prompt, and one position
        given = Tensor([ids[start:end]], dtype=dtypes.int32, device="PYTHON")
        start_pos = UOp.variable("start_pos", 0, LIMIT - end).bind(start)
        rows += model.logits(model.hidden(given, [cache], [start_pos]))[0].realize().tolist()
    uops = [u for program in to_program_cache.values() for u in program.src[1].src]
    products = sum(u.op.name == "WMMA" for u in uops)
    print(json.dumps({"logits": rows, "tensor_core_products": products}))


if __name__ == "__main__":
    main()
