"""Run one command, and turn whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback

from qwen3_tg.cli import arguments
from qwen3_tg.errors import Qwen3Error, UsageError


def main(argv: list[str] | None = None) -> int:
    """Run `qwen3` with these arguments (by default the process's); the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        _run(arguments.parse(argv))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has left; python would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        if debug:
            traceback.print_exc()
        print(f"error: {_message(e)}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


def _run(options: argparse.Namespace) -> None:
    if options.command == "devices":
        from qwen3_tg.cli.inspect import show_devices

        show_devices()
    elif options.command == "tokenize":
        from qwen3_tg.cli.inspect import tokenize

        tokenize(options)
    elif options.command == "chat":
        from qwen3_tg.cli.chat import chat

        chat(options)
    else:
        from qwen3_tg.cli.generate import generate

        generate(options)


def _message(e: Exception) -> str:
    if isinstance(e, Qwen3Error):
        return " ".join(str(e).split())
    if isinstance(e, MemoryError):
        return "out of memory: a smaller model or a shorter --context needs less"
    what = " ".join(str(e).split())[:300]
    return f"unexpected {type(e).__name__}: {what} (run again with --debug for the traceback)"
