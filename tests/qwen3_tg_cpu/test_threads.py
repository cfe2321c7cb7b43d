"""Threads of the CPU's kernels: several models at once, stopping half way, forks and the end of the
process. What may hang runs in a process of its own with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import load_golden
from qwen3_tg_cpu import load

import qwen3_tg

LIMIT_S = 120  # of a process; it takes a few seconds


def run(code: str) -> str:
    """What a program prints, which must end by itself and without an error."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


START = """
import os, sys, time, threading
import qwen3_tg
llm = qwen3_tg.load("tiny", device="CPU", threads=3)
assert llm.policy.kernels == "fast" and llm.policy.threads == 3
def answer(n=20, model=llm):
    return list(model.generate_ids([3, 4, 5], n, stop_ids=()))
right = answer()
"""


def test_two_models_at_once_give_what_they_give_alone() -> None:
    names = ["untied_bfloat16", "moe_bfloat16"]
    models = [qwen3_tg.load(str(load_golden(name).path)) for name in names]

    def answer(n: int) -> list[int]:
        return list(models[n % 2].generate_ids([5, 6, 7, n], 15, stop_ids=()))

    alone = [answer(n) for n in range(6)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, range(6))) == alone


def test_kernels_may_be_called_from_several_threads() -> None:
    """Without the engine's own lock."""
    engine = qwen3_tg.load("tiny", device="CPU")._engine
    right = engine.next_logits([1, 2, 3])
    others = [qwen3_tg.load("tiny", device="CPU")._engine for _ in range(3)]
    for other in others:  # graphs are captured one at a time
        other._next_logits([1, 2, 3], [])

    def compute(n: int) -> np.ndarray:
        engine = others[n]
        engine._forget_from(0)
        return engine._next_logits([1, 2, 3], [])

    for _ in range(20):
        with ThreadPoolExecutor(3) as threads:
            for found in threads.map(compute, range(3)):
                assert np.array_equal(found, right)


def test_the_number_of_threads_may_change_while_a_model_is_used() -> None:
    llm = qwen3_tg.load("tiny", device="CPU", threads=1)
    right = list(llm.generate_ids([3, 4, 5], 10, stop_ids=()))
    for threads in (3, 1, 5, 2):
        kernels = load(threads)
        assert kernels is not None and kernels.threads == threads
        assert list(llm.generate_ids([3, 4, 5], 10, stop_ids=())) == right


def test_a_generation_that_is_dropped_half_way_leaves_a_model_that_goes_on() -> None:
    run(
        START
        + """
for n in range(5):
    generation = llm.generate_ids([7, 8, n], 50, stop_ids=())
    next(generation), next(generation)
    del generation
assert answer() == right
"""
    )


def test_a_process_ends_while_helpers_spin_and_while_they_sleep() -> None:
    run(START)
    run(START + "time.sleep(0.5)")
    run(START + "answer(); sys.exit(0)")
    run(START + "t = threading.Thread(target=answer, args=(3,)); t.start(); t.join()")


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="sends a signal")
def test_an_interrupt_while_it_computes_stops_the_answer_and_no_more() -> None:
    code = (
        START
        + """
# Python drops an interrupt that comes within a __del__: as on the command line, let it come again
from qwen3_tg.cli.main import _repeat_ctrl_c
import sys
sys.unraisablehook = _repeat_ctrl_c
print("ready", flush=True)
try:
    while True:
        answer(200)
except KeyboardInterrupt:
    pass
assert answer() == right
print("goes on", flush=True)
"""
    )

    def heed() -> None:  # tests that run in the background ignore it and would hand that on
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert (out, process.returncode) == ("goes on\n", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_may_end_or_compute_with_threads_of_its_own() -> None:
    code = (
        START
        + """
import warnings
warnings.simplefilter("ignore")
for n in range(3):
    child = os.fork()
    if child == 0:
        if n == 0:
            os._exit(0)
        if n == 1:
            sys.exit(0)
        mine = qwen3_tg.load("tiny", device="CPU")
        os._exit(0 if answer(model=mine) == right else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, (n, status)
    assert answer() == right
"""
    )
    run(code)


def test_nothing_is_busy_while_nothing_is_asked() -> None:
    out = run(
        START
        + """
time.sleep(0.1)
before = time.process_time()
time.sleep(1.5)
print(time.process_time() - before)
"""
    )
    assert float(out) < 0.2
