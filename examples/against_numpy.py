"""Is this device computing right? The same weights on tinygrad and in plain numpy, side by side.

python examples/against_numpy.py [DIRECTORY [DEVICE]]
"""

import sys
from pathlib import Path

import numpy as np
import qwen3_tg_numpy

import qwen3_tg

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(qwen3_tg.__file__).parent / "tiny"
device = sys.argv[2] if len(sys.argv) > 2 else None
ids = list(range(1, 41))

reference = qwen3_tg_numpy.load(path)
expected = reference.logits(ids)
llm = qwen3_tg.load(str(path), device=device, dtype="float32")
found = llm.logits(ids)

error = np.abs(found - expected).max()
agree = (found.argmax(-1) == expected.argmax(-1)).mean()
print(f"{llm.policy.device}: max abs error {error:.1e}, best token the same at {agree:.0%}")
for name, value in list(reference.trace(ids[:1]).items())[:8]:
    print(f"  {name:<32} {value.shape}")  # every step of the reference has a name and a value
sys.exit(0 if error < 1e-3 else 1)
