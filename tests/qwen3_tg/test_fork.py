"""Forked processes, as multiprocessing makes them on Linux before Python 3.14. What may hang runs
in a process of its own with a time limit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tinygrad.helpers import Context

from qwen3_tg.device import Missing, forked, found
from qwen3_tg.errors import DeviceError

LIMIT_S = 120  # of a process; it takes a few seconds

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

START = """
import os, signal, sys, threading, time, warnings
import numpy as np
import qwen3_tg
warnings.simplefilter("ignore")  # Python 3.12 warns of a fork where there are threads

IDS = [3, 4, 5, 60, 7, 8, 9, 1]

def load():
    threads = 1 if KERNELS == "fast" else None
    return qwen3_tg.load("tiny", device="CPU", kernels=KERNELS, threads=threads)

def answer(model, *first):
    return list(model.generate_ids([*first, 3, 4, 5], 20, stop_ids=()))

def fork(work):
    child = os.fork()
    if child:
        return child
    signal.alarm(90)  # should it hang, it ends all the same
    try:
        work()
    except BaseException as e:
        print(type(e).__name__, e, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def ended(*children):
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, status

def refused(work):
    try:
        work()
    except qwen3_tg.UsageError as e:
        assert "loaded in another process" in str(e) and '"spawn"' in str(e) and "\\n" not in str(e)
    else:
        raise AssertionError("the child may use its parent's model")
"""


def run(code: str, kernels: str = "fast", **env: str | None) -> str:
    """What a program prints, which must end by itself and without an error."""
    environment = {k: v for k, v in (os.environ | env).items() if v is not None}
    done = subprocess.run(
        [sys.executable, "-c", f"KERNELS = {kernels!r}\n{START}\n{code}"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("kernels", ["fast", "generic"])
def test_a_forked_child_is_refused_and_leaves_its_parents_model_as_it_is(kernels: str) -> None:
    code = """
llm = load()
slots, batch = llm.slots(2), llm.batch(2)
slot, _ = slots.start(IDS[:4])
right = llm.logits(IDS), llm.next_logits(IDS)  # the second computes the last one alone
step = llm.slots(1)
other = IDS[:3] + [99] * 9
generation = llm.generate_ids(IDS, 5, stop_ids=())
next(generation)

def child():
    engine = llm._engine
    for work in (
        lambda: llm.next_logits(other),
        lambda: llm.logits(other),
        lambda: llm.computed(IDS),
        lambda: llm.save_computed("/nowhere/file", IDS),
        lambda: engine.missing(IDS),
        lambda: engine.take(text),
        lambda: engine.read_for_batch(other),
        lambda: engine.new_caches(1),
        lambda: next(generation),
        lambda: answer(llm, 9),
        lambda: list(llm.generate("1 + 1 =")),
        lambda: list(llm.chat([{"role": "user", "content": "1 + 1"}])),
        lambda: list(batch.answers(["1 + 1 ="])),
        lambda: slots.start(other),
        lambda: slots.step({slot: 7}),
        lambda: step.allocate(),
    ):
        refused(work)

llm.logits(IDS)
text = llm._engine.give(IDS)
before = [tensor.numpy().tobytes() for tensor in llm._engine._cache._tensors]
ended(fork(child), fork(child))
assert before == [tensor.numpy().tobytes() for tensor in llm._engine._cache._tensors]
assert llm._engine.missing([*IDS, 7]) == 1
assert np.array_equal(llm.next_logits(IDS), right[1])
assert np.array_equal(llm.logits(IDS), right[0])
fresh = load().slots(2)
assert fresh.start(IDS[:4])[0] == slot
assert np.array_equal(slots.step({slot: 7})[slot], fresh.step({slot: 7})[slot])
"""
    run(code, kernels)


def test_a_pool_of_forked_processes_gives_errors_and_no_wrong_answers() -> None:
    code = """
import multiprocessing
llm = load()
right = answer(llm)

def work(n):
    try:
        return answer(llm, n)
    except qwen3_tg.UsageError as e:
        return str(e)

with multiprocessing.get_context("fork").Pool(2) as pool:
    found = pool.map_async(work, range(30))
    while not found.ready():
        assert answer(llm) == right
assert all("loaded in another process" in each for each in found.get()), found.get()
assert answer(llm) == right
"""
    run(code)


@pytest.mark.parametrize("kernels", ["fast", "generic"])
def test_a_fork_while_a_thread_computes_is_refused_or_loads_a_model_of_its_own(
    kernels: str,
) -> None:
    """Also while it captures its graphs, of which the child must not find half."""
    code = """
llm = load()
right, done, wrong = answer(load()), False, []

def compute():
    while not done:
        if answer(llm) != right:
            wrong.append(1)

def child():
    refused(lambda: answer(llm))
    assert answer(load()) == right

thread = threading.Thread(target=compute)
thread.start()
time.sleep(0.01)
for n in range(3):
    ended(fork(child))
done = True
thread.join()
assert not wrong
"""
    run(code, kernels)


@pytest.mark.parametrize("kernels", ["fast", "generic"])
def test_models_loaded_in_forked_children_answer_rightly_at_the_same_time(kernels: str) -> None:
    """And where the parent loads another one then: what tinygrad has freed is used by one alone."""
    code = """
llm = load()
right = [answer(llm, n) for n in range(8)]

def child():
    global llm
    llm = None  # its memory is the parent's
    mine = load()
    for n in range(8):
        assert answer(mine, n) == right[n], n

children = [fork(child) for _ in range(2)]
other = load()
for n in range(8):
    assert answer(other, n) == right[n] == answer(llm, n), n
ended(*children)
for n in range(8):
    assert answer(other, n) == right[n] == answer(llm, n), n
"""
    run(code, kernels)


def test_what_tinygrad_has_freed_is_not_reused_in_a_forked_child() -> None:
    code = """
from tinygrad.device import Buffer, Device
from tinygrad import dtypes
size = 12345
given, used = (Buffer("CPU", size, dtypes.uint8, preallocate=True) for _ in range(2))
given._buf.cpu_view()[:] = used._buf.cpu_view()[:] = bytes(size)
addresses = {given._buf.va_addr, used._buf.va_addr}
given.deallocate()

def child():
    used.deallocate()
    mine = [Buffer("CPU", size, dtypes.uint8, preallocate=True) for _ in range(2)]
    for one in mine:
        one._buf.cpu_view()[:] = bytes([1]) * size

ended(fork(child))
assert not any(used._buf.cpu_view()[:])
again = Buffer("CPU", size, dtypes.uint8, preallocate=True)
assert again._buf.va_addr in addresses and not any(again._buf.cpu_view()[:])
"""
    run("from qwen3_tg.device import forked\n" + code)


def test_a_child_that_is_forked_within_a_step_may_leave_it() -> None:
    code = """
llm = load()
with llm._engine.turn:
    child = os.fork()
if child == 0:
    mine = load()
    os._exit(0 if answer(mine) else 1)
ended(child)
assert answer(llm)
"""
    run(code)


def test_a_forked_child_finds_its_device_by_itself() -> None:
    """Without the drivers that its parent has opened to look for one: OpenCL, where it is there."""
    code = """
llm = qwen3_tg.load("tiny")
right = answer(llm)

def child():
    mine = qwen3_tg.load("tiny")
    assert mine.policy.device == llm.policy.device
    assert answer(mine) == right

if llm.policy.device == "CPU":
    ended(fork(child))
"""
    run(code, DEV=None)


def test_a_device_of_the_parents_is_refused_and_not_replaced_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forked, "_opened_by_parent", {"CUDA"})
    monkeypatch.setattr(found.missing, "before_opening", lambda name: None)
    lost = r"device CUDA does not work: its driver was started in the process .*\"spawn\""
    with pytest.raises(DeviceError, match=lost):
        found.pick("CUDA")

    def problem_of(name: str) -> Missing | None:
        return forked.problem_after_fork(name) or (None if name == "CPU" else Missing("absent"))

    monkeypatch.setattr(found, "problem_of", problem_of)
    with Context(DEV=""):
        with pytest.raises(DeviceError, match=lost + r'.*or name another: device="CPU"'):
            found.pick(None)
        assert found.pick("CPU")[0] == "CPU"
        monkeypatch.setattr(found, "is_software", lambda name: name == "CUDA")
        assert found.pick(None)[0] == "CPU"
