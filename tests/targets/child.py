"""Run by test_ran.py in a process of its own, whose DEV says the target: the logits of a checkpoint
there, by the product, as JSON on stdout."""

from __future__ import annotations

import json
import sys

import numpy as np

import qwen3_tg
from qwen3_tg.sampling import Sampling


def main() -> None:
    path, device, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    kernels = "generic" if device == "CPU" else None
    llm = qwen3_tg.load(path, device, kernels=kernels)
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
        "batch": side_by_side(llm, ids),
        "kept": going_on(llm, qwen3_tg.load(path, device, kernels=kernels), ids * 4),
    }
    print(json.dumps(found))


def side_by_side(llm: qwen3_tg.LLM, ids: list[int]) -> float:
    """How far logits of two sequences at once are from those of each alone, by their spread."""
    texts = [ids, ids[1:4]]
    right = np.stack([llm.next_logits(text) for text in texts])
    slots = llm.slots(2)
    started = [slots.start(text[:-1])[0] for text in texts]
    found = slots.step({slot: text[-1] for slot, text in zip(started, texts, strict=True)})
    rows = np.stack([np.asarray(found[slot]) for slot in started])
    return float(np.abs(rows - right).max() / right.std())


def going_on(llm: qwen3_tg.LLM, undisturbed: qwen3_tg.LLM, ids: list[int]) -> dict[str, object]:
    """With a text after another one: what need not be computed again, and whether the logits are
    those without the other one."""
    longer = [*ids, *ids[:2]]
    llm.next_logits(ids)
    llm.next_logits(ids[::-1])
    tokens, _ = llm.computed(longer)
    found = llm.next_logits(longer)
    undisturbed.next_logits(ids)
    return {"tokens": tokens, "same": bool((found == undisturbed.next_logits(longer)).all())}


if __name__ == "__main__":
    main()
