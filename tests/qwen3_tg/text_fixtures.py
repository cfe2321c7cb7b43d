"""The released tokenizer as fixtures; a test module takes them by `pytest_plugins`.

No conftest.py, because a second one would hide the one above from `from conftest import ...`."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path

import pytest
from text_data import DATA, TOKENIZER_SHA256

from qwen3_tg.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = lzma.decompress((DATA / "tokenizer.json.xz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == TOKENIZER_SHA256
    path = tmp_path_factory.mktemp("released") / "tokenizer.json"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer(tokenizer_file)
