"""The text side of GGUF files: the tokenizer, end tokens and chat template that are in them are
those of the checkpoint that they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from format_writers import random_model, write_gguf
from text_data import DATA, by_name, read_data

import qwen3_tg
from qwen3_tg.llm import LLM

pytest_plugins = ["text_fixtures"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 151936,
}
CASES: dict[str, Any] = read_data("tokenizer_cases.json")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> LLM:
    """A model of 151,936 rows with the released tokenizer, from a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    template = (DATA / "chat_template.jinja").read_text(encoding="utf-8")
    config, weights = random_model(tied=True, **SMALL)
    write_gguf(path, config, weights, "Q8_0", tokenizer=tokenizer_file, chat_template=template)
    return qwen3_tg.load(str(path))


@pytest.mark.parametrize("case", by_name(CASES["encode"]))
def test_its_tokenizer_encodes_and_decodes_as_the_released_one(
    llm: LLM, case: dict[str, Any]
) -> None:
    assert llm.tokenizer is not None
    assert llm.tokenizer.encode(case["text"]) == case["ids"]
    assert llm.tokenizer.decode(case["ids"]) == case["decoded"]
    found = llm.tokenizer.decode(case["ids"], skip_special=True)
    assert found == case["decoded_skip_special"]


def test_ids_behind_the_vocabulary_have_no_text(llm: LLM) -> None:
    assert llm.tokenizer is not None
    assert llm.tokenizer.vocab_size == 151669
    assert llm.tokenizer.decode([151669, 151935]) == ""


def test_it_stops_at_both_end_tokens(llm: LLM) -> None:
    assert {151645, 151643} <= set(llm.stop_ids)


def test_its_chat_template_renders_as_the_released_one(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    found = llm.render(messages, add_generation_prompt=True)
    assert found == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_without_a_tokenizer_still_computes(tmp_path: Path) -> None:
    config, weights = random_model(tied=True, **SMALL | {"vocab_size": 100})
    write_gguf(tmp_path / "model.gguf", config, weights, "Q8_0")
    llm = qwen3_tg.load(str(tmp_path / "model.gguf"))
    assert llm.tokenizer is None
    assert llm.logits([1, 2, 3]).shape == (3, 100)
