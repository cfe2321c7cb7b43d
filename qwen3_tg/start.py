"""From a checkpoint to an engine: weights go to the device, and the model is built around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from qwen3_tg import compiler
from qwen3_tg import device as devices
from qwen3_tg.checkpoint import Checkpoint
from qwen3_tg.forward import Fast, Lowered
from qwen3_tg.generate import Engine
from qwen3_tg.kernel_cache import KernelCache
from qwen3_tg.linear import DTYPES, to_device
from qwen3_tg.model import Qwen3
from qwen3_tg.placement import place
from qwen3_tg.plan import ModelSize, load_factor, make_plan
from qwen3_tg.rope import rope_table
from qwen3_tg.shards import split_axis
from qwen3_tg.tuning import for_policy


def start_engine(
    checkpoint: Checkpoint,
    policy: devices.Policy,
    context: int,
    on_progress: Callable[[int, int], None] | None,
    shelf_bytes: int,
) -> tuple[Engine, int]:
    """Put the weights on the device, one at a time, and build the model around them. Also gives the
    bytes of weights that are used where they lie."""
    # one file of kernels for each kind of model, so that none is loaded in vain
    config, stored = checkpoint.config, checkpoint.weights
    kinds = [(weight.format, *weight.params.items()) for weight in stored.values()]
    how = (policy.device, policy.dtype, policy.kv_dtype, policy.prefill_chunk, policy.kernels)
    tuning = for_policy(policy)
    shape = hashlib.sha256(f"{config} {kinds} {how} {tuning.fingerprint}".encode()).hexdigest()[:16]
    name = f"{compiler.fingerprint()}-{shape}"
    programs = KernelCache(compiler.cache_dir(), name)
    programs.load()

    factor = load_factor(policy) or 1.0
    plan = make_plan(ModelSize.of(config, stored, len(policy.devices)), policy, context, factor)
    devices.check_memory(policy.device, plan.first_parts)
    weights, done, shared = {}, 0, devices.shares_memory(policy)
    total = sum(weight.device_bytes for weight in stored.values())
    for weight_name, weight in stored.items():
        axis = split_axis(weight_name, weight, len(policy.devices))
        weights[weight_name] = to_device(weight, policy.device, policy.native, shared, axis)
        done += weight.device_bytes
        if on_progress:
            on_progress(done, total)
    table = rope_table(config, context + policy.prefill_chunk)
    rope = place(table, policy.devices)
    model = Qwen3(config, weights, rope, DTYPES[policy.dtype])
    kernels = devices.own_kernels(policy)
    forward = Fast(model, kernels) if kernels else Lowered(model)
    used_there = sum(array.nbytes for weight in weights.values() for array in weight.shared)
    engine = Engine(config, forward, policy, context, programs, tuning, shelf_bytes)
    return engine, used_there
