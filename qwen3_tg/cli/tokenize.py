"""`qwen3 tokenize`: the tokens that the model would read."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen3_tg.checkpoint import locate, open_checkpoint
from qwen3_tg.cli.arguments import read_text
from qwen3_tg.errors import CheckpointError, UsageError
from qwen3_tg.tokenizer import Tokenizer


def tokenize(options: argparse.Namespace) -> None:
    """Print a line a token: its id and its text; or ids, or a count, or the text of ids."""
    tokenizer = Tokenizer(_tokenizer_of(options.model), options.model)
    text = read_text(options.prompt, keep_end=True)
    if not text:
        raise UsageError("no text: qwen3 tokenize TEXT, or pipe one in")
    if options.decode:
        words = text.replace(",", " ").replace("[", " ").replace("]", " ").split()
        if wrong := [word for word in words if not word.isdecimal()]:
            raise UsageError(f"--decode takes token ids, found {wrong[0]!r}")
        if unknown := [word for word in words if not tokenizer.token_bytes(int(word))]:
            raise UsageError(f"the tokenizer has no token {unknown[0]}")
        print(tokenizer.decode(map(int, words)))
        return
    ids = tokenizer.encode(text)
    if options.count:
        print(len(ids))
    elif options.ids:
        print(*ids)
    else:
        for id in ids:
            part = tokenizer.token_bytes(id)
            print(f"{id:>6}  {_shown(part)}")


def _tokenizer_of(model: str) -> Path | str:
    """A folder's tokenizer.json, which is enough without weights; or what a GGUF file holds."""
    path = locate(model)
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.is_dir() and not any(path.glob("*.gguf")):
        raise CheckpointError(f"{path}: no tokenizer.json in it")
    if (tokenizer := open_checkpoint(model).tokenizer) is None:
        raise CheckpointError(f"{path}: no tokenizer in it")
    return tokenizer


def _shown(part: bytes) -> str:
    """A token's text in quotes; its bytes where it is only a part of a character."""
    try:
        return repr(part.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(part)
