"""The command `qwen3`: the only room that prints or exits.

stdout carries the model's text (or the answer of `tokenize` and `devices`) and nothing else;
thinking, notes and errors go to stderr. Exit codes: 0, 1 for an error, 2 for a wrong call, 130 for
Ctrl-C, 141 for a closed pipe.
"""

from qwen3_tg.cli.main import main

__all__ = ["main"]
