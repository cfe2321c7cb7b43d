"""Loading maps files and holds no more than the weights and one tensor; measured in a process of
its own, as only the system knows what a process ever held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from format_writers import random_model, write_float, write_gguf

MB = 10**6
# Of a checkpoint of some 100 MB, most of it in matrices of 6 MB and an embedding of 25 MB.
SIZES = {
    "vocab_size": 12_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 3,
    "max_position_embeddings": 2016,
}
WHAT = """
import json, sys
import qwen3_tg
from qwen3_tg import device, usage
device.choose("CPU")
before = usage.peak_resident_bytes()
llm = qwen3_tg.load(sys.argv[1], device="CPU")
loaded = usage.peak_resident_bytes()
print(len(list(llm.generate_ids([1, 2, 3], max_new_tokens=1, stop_ids=()))))
plan, tensors = usage.plan_of(llm), [w.nbytes for w in llm.checkpoint.weights.values()]
found = {"before": before, "loaded": loaded, "peak": usage.peak_resident_bytes()}
found |= {"planned": plan.full_bytes, "weights": plan.weights_bytes, "largest": max(tensors)}
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
@pytest.mark.parametrize("format", ["bfloat16", "Q8_0"])
def test_peak_memory_is_what_was_announced(format: str, tmp_path: Path) -> None:
    config, weights = random_model(**SIZES)
    path = tmp_path / "model.gguf" if format == "Q8_0" else tmp_path
    if format == "Q8_0":
        write_gguf(path, config, weights, format)
    else:
        write_float(path, config, weights, format)
    del weights
    found = measured(path)
    assert found["weights"] > (45 if format == "Q8_0" else 85) * MB
    assert found["peak"] <= 1.10 * found["planned"] + 300 * MB
    # 40 MB: modules that loading imports. Pages of the file that stayed would be 60 or 115 more.
    assert found["loaded"] - found["before"] <= found["weights"] + found["largest"] + 40 * MB


def measured(path: Path) -> dict[str, int]:
    run = subprocess.run(
        [sys.executable, "-c", WHAT, str(path)], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert lines[0] == "1"
    found: dict[str, int] = json.loads(lines[-1])
    print(found)
    return found
