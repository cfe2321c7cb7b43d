"""Run by test_ran.py in a process of its own, whose DEV says the target: the logits of a checkpoint
there, by the product, as JSON on stdout."""

from __future__ import annotations

import json
import sys

import qwen3_tg
from qwen3_tg.sampling import Sampling


def main() -> None:
    path, device, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    llm = qwen3_tg.load(path, device, kernels="generic" if device == "CPU" else None)
    from tinygrad.device import Device

    every = llm.logits(ids)  # a prompt
    steps = list(llm.generate_ids(ids, 4, sampling=Sampling(temperature=0), stop_ids=()))
    found = {
        "device": llm.policy.device,
        "renderer": type(Device[llm.policy.device].renderer).__name__,
        "dtype": llm.policy.dtype,
        "native": sorted(llm.policy.native),
        "logits": every.tolist(),
        "generated": [int(id) for id in steps],
        "decoded": llm.logits([*ids, *steps])[-1].tolist(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
