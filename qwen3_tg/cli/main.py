"""Run one command, and turn whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import io
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

from qwen3_tg import compiler
from qwen3_tg.cli import arguments
from qwen3_tg.errors import Qwen3Error, UsageError

# Commands whose modules import tinygrad, which reads some of its settings only then.
_WITH_TINYGRAD = ("check", "kernels")
# Commands whose 1 says that something was found wrong, and not that nothing could be found.
_VERDICTS = (["check"], ["replay"])


def main(argv: list[str] | None = None) -> int:
    """Run `qwen3` with these arguments (by default the process's); the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.pop("DEBUG", None)  # many programs' switch; tinygrad's would print to stdout
    closed = _replace_closed_streams()
    hook, sys.unraisablehook = sys.unraisablehook, _repeat_ctrl_c
    try:
        try:
            return _run_and_report(argv, stdout_is_closed="stdout" in closed)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except OSError as e:  # whoever read our output has left, or the disk is full
        for stream in (sys.stdout, sys.stderr):  # python would complain once more at its end
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141 if isinstance(e, BrokenPipeError) else 1
    finally:
        sys.unraisablehook = hook


def _run_and_report(argv: list[str], stdout_is_closed: bool) -> int:
    try:
        options = arguments.parse(argv)
        if stdout_is_closed:
            raise UsageError("stdout is closed: there is no place for an answer")
        with warnings.catch_warnings():
            show: Any = _note
            warnings.showwarning = show
            code = _run(options)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as e:
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {_message(e)}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) or argv[:1] in _VERDICTS else 1


def _note(message: Warning | str, *where: object) -> None:
    """A warning as one of our notes, without the place in the code."""
    print(f"note: {message}", file=sys.stderr)


def _replace_closed_streams() -> list[str]:
    """Python has None for a stream that is closed (`>&-`); the names of those."""
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:  # in the order of their numbers, which the system gives out again
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    return closed


def _repeat_ctrl_c(unraisable: sys.UnraisableHookArgs) -> None:
    """Ctrl-C in the middle of a `__del__` is lost in Python: let it come again a moment later."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.02, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def _run(options: argparse.Namespace) -> int | None:
    """The exit code; None is 0."""
    module, _, function = arguments.COMMANDS[options.command].partition(":")
    if options.command in _WITH_TINYGRAD:
        compiler.prepare_environment()
    run: Callable[[argparse.Namespace], int | None] = getattr(
        import_module(f"qwen3_tg.cli.{module}"), function
    )
    return run(options)


def _message(e: Exception) -> str:
    if isinstance(e, Qwen3Error):
        return " ".join(str(e).split())
    if isinstance(e, MemoryError):
        return "out of memory: a smaller model or a shorter --context needs less"
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return f"cannot write the output: {e.strerror}"
    what = " ".join(str(e).split())[:300]
    return f"unexpected {type(e).__name__}: {what} (run again with --debug for the traceback)"
