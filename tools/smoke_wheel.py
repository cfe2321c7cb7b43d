"""Build the wheel, install it into a clean environment outside the checkout, and use it there.

    python tools/smoke_wheel.py

The environment's PATH has no compiler: first the one clear error must come, and with the extra
`compiler` from PyPI the answer. Needs the network (pip), so it is no test.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION, ANSWER = "What is 37 + 85?", "122\n"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="qwen3-wheel-") as name:
        folder = Path(name)
        build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("*.whl")
        check_contents(wheel)
        environment = folder / "environment"
        venv.create(environment, with_pip=True)
        pip(environment, str(wheel))

        code, out, err = run(environment, folder, QUESTION)
        expect("one clear error without a compiler", code == 1 and out == "")
        expect("it is one line", err.startswith("error: ") and err.count("\n") == 1, err)
        expect("it says what to do", "pip install 'qwen3-tg[compiler]'" in err, err)

        pip(environment, f"{wheel}[compiler]")
        for start in ("first", "second"):
            code, out, err = run(environment, folder, QUESTION)
            expect(f"the {start} answer is right", (code, out) == (0, ANSWER), out + err)
        _, _, err = run(environment, folder, "-v", *QUESTION.split(" "))
        expect("the CPU's own kernels are used", "fast kernels on" in err, err)
        code, out, err = run(environment, folder, "devices")
        expect("devices marks the CPU", code == 0 and "* CPU" in out, out + err)
        code = "import qwen3_tg_numpy, sys; sys.exit('tinygrad' in sys.modules)"
        reference = subprocess.run([environment / "bin" / "python", "-c", code], cwd=folder)
        expect("the reference is installed beside it", reference.returncode == 0)


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    ours = {"qwen3_tg", "qwen3_tg_cpu", "qwen3_tg_numpy"}
    expect("the wheel holds our packages alone", tops == ours, str(tops))
    files = ("qwen3_tg/tiny/model.safetensors", "qwen3_tg/py.typed", "qwen3_tg_cpu/steps.c")
    for name in files:
        expect(f"the wheel holds {name}", name in names)


def pip(environment: Path, *what: str) -> None:
    subprocess.run(
        [environment / "bin" / "python", "-m", "pip", "install", "--quiet", *what], check=True
    )


def run(environment: Path, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """The installed command in an empty home, with a PATH that has nothing on it, and without
    OpenCL's drivers: some end the process where they do not find a linker."""
    nothing, home = folder / "nothing", folder / "home"
    nothing.mkdir(exist_ok=True)
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [environment / "bin" / "qwen3", *arguments],
        env={
            "PATH": str(nothing),
            "HOME": str(home),
            "DEV": "CPU",
            "OCL_ICD_VENDORS": str(nothing),
        },
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def expect(what: str, fine: bool, found: str = "") -> None:
    if not fine:
        sys.exit(f"FAILED: {what}: {found}")
    print(f"ok: {what}")


if __name__ == "__main__":
    main()
