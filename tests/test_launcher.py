"""`./qwen3` makes its environment once. A stand-in for python shows what it is asked to do."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = "sh cat cksum dirname mkdir readlink rm sleep".split()
# Plays the system's python and, copied into the environment, that one's python too.
PYTHON = """\
#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
*version_info*) exit "${TOO_OLD:-0}" ;;
*flock*) exec "$REAL_PYTHON" "$@" ;;
*"import ensurepip"*) exit "${NO_ENSUREPIP:-0}" ;;
*"import pip"* | *"-m ensurepip"*) exit "${OWN_WITHOUT_PIP:-0}" ;;
*find_compiler*) exit "${NO_COMPILER:-0}" ;;
*"-m pip"*) exit "${PIP_FAILS:-0}" ;;
"-m venv "*)
    sleep 0.1
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    printf '#!/bin/sh\\necho "qwen3 got:" "$@"\\n' >"$3/bin/qwen3"
    chmod +x "$3/bin/qwen3"
    ;;
esac
"""


class Fresh:
    """A checkout with nothing but the launcher, and a PATH with nothing but basic tools."""

    def __init__(self, folder: Path):
        self.checkout, self.bin, self.log = folder / "a checkout", folder / "bin", folder / "log"
        self.checkout.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "qwen3", self.checkout)
        (self.checkout / "pyproject.toml").write_text("[project]\n")
        for tool in [*TOOLS, "cp", "chmod"]:
            found = shutil.which(tool)
            assert found
            (self.bin / tool).symlink_to(found)
        (self.bin / "python3").write_text(PYTHON)
        (self.bin / "python3").chmod(stat.S_IRWXU)

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": str(self.bin), "LOG": str(self.log), "REAL_PYTHON": sys.executable}

    def run(self, *arguments: str, command: Path | None = None, **env: str) -> tuple[int, str, str]:
        self.log.write_text("")
        run = subprocess.run(
            [command or self.checkout / "qwen3", *arguments],
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return run.returncode, run.stdout, run.stderr

    def calls(self, text: str) -> int:
        return sum(text in line for line in self.log.read_text().splitlines())


@pytest.fixture
def fresh(tmp_path: Path) -> Fresh:
    return Fresh(tmp_path)


def test_the_first_start_sets_up_and_the_second_is_instant(fresh: Fresh) -> None:
    code, out, err = fresh.run("What is", "37 + 85?")
    assert (code, out) == (0, "qwen3 got: What is 37 + 85?\n"), err
    assert "Setting up qwen3, once." in err
    assert fresh.calls("-m venv") == 1 and fresh.calls("-m pip") == 1
    code, out, err = fresh.run("--model", "x y", "")
    assert (code, out, err) == (0, "qwen3 got: --model x y \n", "")
    assert fresh.log.read_text() == "", "python is not even asked"


def test_a_changed_project_file_sets_up_again(fresh: Fresh) -> None:
    fresh.run()
    (fresh.checkout / "pyproject.toml").write_text("[project]\nchanged = true\n")
    assert fresh.run()[0] == 0
    assert fresh.calls("-m pip") == 1


def test_a_moved_checkout_sets_up_again(fresh: Fresh) -> None:
    fresh.run()
    moved = fresh.checkout.rename(fresh.checkout.with_name("moved"))
    assert fresh.run(command=moved / "qwen3")[0] == 0
    assert fresh.calls("-m venv") == 1


def test_a_link_to_the_launcher_works(fresh: Fresh) -> None:
    link = fresh.bin / "qwen3"
    link.symlink_to(fresh.checkout / "qwen3")
    assert fresh.run("hi", command=link)[1] == "qwen3 got: hi\n"
    assert (fresh.checkout / ".venv").is_dir()


def test_a_compiler_is_brought_only_where_there_is_none(fresh: Fresh) -> None:
    fresh.run()
    assert fresh.calls("[compiler]") == 0
    (fresh.checkout / ".venv" / "qwen3-ready").unlink()
    code, _, err = fresh.run(NO_COMPILER="1")
    assert "ziglang" in err
    assert fresh.calls("[compiler]") == 1
    assert code == 1, "and if that one does not run either, it says so"
    assert "install clang 16 or newer" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"TOO_OLD": "1"}, "no Python 3.11 or newer found"),
        ({"NO_ENSUREPIP": "1"}, "apt install python3-venv"),
        ({"PIP_FAILS": "1"}, "pip could not install"),
    ],
)
def test_what_is_missing_is_one_error_and_the_next_start_tries_again(
    fresh: Fresh, env: dict[str, str], text: str
) -> None:
    code, out, err = fresh.run("hi", **env)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (1, "", 1)
    assert text in errors[0]
    assert fresh.run("hi")[:2] == (0, "qwen3 got: hi\n")


def test_an_environment_of_the_users_own_is_used_and_not_deleted(fresh: Fresh) -> None:
    fresh.run()
    (fresh.checkout / ".venv" / "made-by-qwen3").unlink()
    (fresh.checkout / ".venv" / "qwen3-ready").unlink()
    (fresh.checkout / ".venv" / "precious").write_text("mine")
    (fresh.bin / "python3").unlink()  # there may be no other Python
    code, _, err = fresh.run("hi")
    assert code == 0 and "your own Python environment" in err
    assert (fresh.checkout / ".venv" / "precious").read_text() == "mine"


@pytest.mark.parametrize("broken", ["a file", "a folder", "no interpreter"])
def test_what_stands_in_the_way_is_named_and_not_deleted(fresh: Fresh, broken: str) -> None:
    env = fresh.checkout / ".venv"
    if broken == "a file":
        env.write_text("mine")
    else:
        (env / "bin").mkdir(parents=True)
        (env / "precious").write_text("mine")
    if broken == "no interpreter":
        (env / "bin" / "python").symlink_to("/nowhere/python3.11")
    code, _, err = fresh.run("hi")
    assert code == 1 and f"error: {env} is no Python environment that works" in err
    assert (env if broken == "a file" else env / "precious").read_text() == "mine"


def test_an_own_environment_without_pip_is_one_error(fresh: Fresh) -> None:
    fresh.run()
    (fresh.checkout / ".venv" / "made-by-qwen3").unlink()
    (fresh.checkout / ".venv" / "qwen3-ready").unlink()
    code, _, err = fresh.run("hi", OWN_WITHOUT_PIP="1")
    assert code == 1 and "has no pip; install it there" in err.splitlines()[-1]


def test_a_half_made_environment_of_ours_is_made_anew(fresh: Fresh) -> None:
    (fresh.checkout / ".venv").mkdir()
    (fresh.checkout / ".venv" / "made-by-qwen3").touch()
    (fresh.checkout / ".venv" / "half").touch()
    assert fresh.run("hi")[1] == "qwen3 got: hi\n"
    assert not (fresh.checkout / ".venv" / "half").exists()


def test_of_starts_at_the_same_time_one_sets_up_and_the_others_wait(fresh: Fresh) -> None:
    fresh.log.write_text("")
    (fresh.checkout / ".venv.lock").write_text("left by a start that was killed")
    starts = [
        subprocess.Popen(
            [fresh.checkout / "qwen3", str(n)],
            env=fresh.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for n in range(6)
    ]
    for n, start in enumerate(starts):
        assert start.communicate(timeout=60)[0] == f"qwen3 got: {n}\n".encode()
    assert fresh.calls("-m venv") == 1 and fresh.calls("-m pip") == 1


def test_the_checkout_is_the_same_by_another_path(fresh: Fresh) -> None:
    fresh.run()
    (fresh.bin / "linked").symlink_to(fresh.checkout)
    assert fresh.run("hi", command=fresh.bin / "linked" / "qwen3")[1] == "qwen3 got: hi\n"
    assert fresh.log.read_text() == ""


def test_test_runs_linters_types_and_tests(fresh: Fresh) -> None:
    code, _, err = fresh.run("test")
    assert code == 0, err
    assert fresh.calls("[test]") == 1
    for step in ("ruff check", "ruff format", "mypy", "pytest"):
        assert fresh.calls(f"-m {step}") == 1
    assert fresh.run("test", "tests/x.py", "-k", "y")[0] == 0
    assert fresh.log.read_text() == "-m pytest tests/x.py -k y\n"


def test_the_launcher_is_executable() -> None:
    assert os.access(ROOT / "qwen3", os.X_OK)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
