"""Shared by all tests: their device, the golden checkpoints, and the report of formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

# Read by tinygrad when it is first imported. Tests that need another device start a process.
os.environ["DEV"] = "CPU"
# Compiled kernels and what is typed, in a place of our own; `pytest --cache-clear` empties it.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parent.parent / ".pytest_cache" / "d")
os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] + "/state"
os.environ.pop("CACHEDB", None)

import numpy as np
import pytest

from qwen3_tg.compiler import prepare_environment

prepare_environment()  # tests import tinygrad themselves

_ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())

# Measured: at most 2.9e-5 on the golden checkpoints, whose logits have a standard deviation of one.
FLOAT32_TOLERANCE = 1e-4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--formats-report",
        metavar="FILE",
        type=Path,
        help="write what the tests of formats measured to this JSON file",
    )
    parser.addoption(
        "--all-targets",
        action="store_true",
        help="fail where a target's compiler or driver is missing, instead of skipping",
    )


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--formats-report")
    if file is not None and not hasattr(config, "workerinput"):  # a worker of pytest-xdist
        config.pluginmanager.register(FormatsReport(file))


class FormatsReport:
    """Collects what passed tests gave to `record_format`, from all of pytest-xdist's workers."""

    def __init__(self, file: Path):
        self._file = file
        self._rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._rows += [row for name, row in report.user_properties if name == "format"]

    def pytest_sessionfinish(self) -> None:
        rows = sorted(self._rows, key=lambda row: (row["format"], row["model"], row["engine"]))
        self._file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def record_format(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """To call with a row for the report: format, model, engine, device, max_abs_error."""

    def record(**row: str | float) -> None:
        record_property("format", row)

    return record


@dataclass(frozen=True)
class Golden:
    """What transformers computed for a checkpoint (tools/make_golden.py)."""

    name: str
    path: Path
    values: dict[str, np.ndarray]

    @property
    def ids(self) -> list[int]:
        return self.values["ids"].tolist()

    @property
    def logits(self) -> np.ndarray:
        return self.values["logits"]

    @property
    def greedy_ids(self) -> list[int]:
        return self.values["greedy_ids"].tolist()


def with_cache(folder: Path) -> dict[str, str]:
    """The environment of a process that keeps its kernels in this folder."""
    env = os.environ | {"XDG_CACHE_HOME": str(folder)}
    env.pop("CACHEDB", None)  # set for this process
    return env


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / name / "golden.npz") as values:
        return Golden(name, GOLDEN / name, dict(values))


# Each compiles kernels of its own on tinygrad; these three of the family have its rules: tied and
# not, H*Hd other than D, a mixture.
_QUICK_FAMILY = ("family_Qwen3-0.6B", "family_Qwen3-32B", "family_Qwen3-30B-A3B")


def _golden_param(name: str) -> Any:
    is_long = name.startswith("family_") and name not in _QUICK_FAMILY
    return pytest.param(name, marks=pytest.mark.long if is_long else ())


@pytest.fixture(params=map(_golden_param, GOLDEN_NAMES))
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session", autouse=True)
def _runs_on_the_cpu_with_clang() -> None:
    from qwen3_tg.device import choose

    assert choose().device == "CPU"
    from tinygrad.device import Device

    assert type(Device["CPU"].renderer).__name__ == "ClangRenderer"


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal shapes and values within `tolerance`; says how far apart they are."""
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    relative = difference.max() / max(np.abs(expected).max(), 1e-30)
    agree = (found.argmax(-1) == expected.argmax(-1)).mean()
    assert difference.max() <= tolerance, (
        f"max abs error {difference.max():.3g} > {tolerance:.3g}, max relative {relative:.3g}, "
        f"argmax agrees at {agree:.1%}"
    )


# What a target needs may not be installed: then its tests skip and say why, or fail where
# --all-targets says that everything should be there.


@pytest.fixture
def absent(request: pytest.FixtureRequest) -> Callable[[str], NoReturn]:
    """To call with what is missing."""

    def call(reason: str) -> NoReturn:
        if request.config.getoption("--all-targets"):
            pytest.fail(f"should be installed: {reason}")
        pytest.skip(reason)

    return call


@pytest.fixture
def needs_device(absent: Callable[[str], NoReturn]) -> Callable[[str], None]:
    """To call with a DEV that the test runs on."""

    def call(dev: str) -> None:
        if problem := _problem(dev):
            absent(f"{dev}: {problem}")

    return call


@cache
def _problem(dev: str) -> str | None:
    """As `qwen3 devices` says it, in a process with this DEV."""
    code = (
        "import json, sys; from qwen3_tg import compiler; compiler.prepare_environment()\n"
        "from qwen3_tg.device.found import problem_of\n"
        "print(json.dumps(str(problem_of(sys.argv[1]))))"
    )
    paths = [str(_ROOT), str(_ROOT / "backends")]
    environment = os.environ | {"DEV": dev, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, dev.partition(":")[0]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: str = json.loads(done.stdout.splitlines()[-1])
    return None if found == "None" else found
