"""Time from the start of a process to its first token: what a user waits for.

A process of its own loads the model and computes one token of a short prompt; cold is with a new,
empty cache of kernels, warm with the one that the cold process left."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from qwen3_tg.errors import DeviceError

_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def first_token_s(options: dict[str, Any]) -> tuple[float, float]:
    """Seconds cold, and warm. `options` are those of `load_or_make`. Raises DeviceError with the
    last line that the process wrote."""
    code = "from qwen3_tg.bench import first_token; first_token.child()"
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        environment.pop("CACHEDB", None)
        for _ in range(2):
            command = [sys.executable, "-c", code, json.dumps(options)]
            began = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds.append(time.perf_counter() - began)
            if done.returncode:
                last = (done.stderr.strip() or "no message").splitlines()[-1]
                last = re.sub(r"^qwen3_tg\.errors\.\w+: ", "", last)
                raise DeviceError(f"the process for the first token failed: {last}")
    return seconds[0], seconds[1]


def child() -> None:
    """What that process does."""
    llm = load_or_make(json.loads(sys.argv[1]))
    next(llm.generate_ids(_PROMPT, 1, stop_ids=()))


def load_or_make(options: dict[str, Any], on_progress: Any = None) -> Any:
    """The LLM of "model", or of "shape" and "quant" with random weights; the other options are
    load()'s. What was computed before is not kept: it is to be measured."""
    from qwen3_tg import device
    from qwen3_tg.bench.random_weights import random_checkpoint
    from qwen3_tg.llm import LLM, load

    how = {key: options.get(key) for key in ("device", "dtype", "kv_dtype", "kernels", "threads")}
    if options.get("shape") is None:
        how |= {"context": options.get("context"), "on_progress": on_progress}
        return load(options["model"], prefix_cache_bytes=0, **how)
    checkpoint = random_checkpoint(options["shape"], options["quant"])
    config, context, _ = checkpoint.config.with_context(options.get("context"))
    del config  # YaRN changes nothing of the speed
    return LLM(checkpoint, device.choose(**how), context, on_progress, prefix_cache_bytes=0)
