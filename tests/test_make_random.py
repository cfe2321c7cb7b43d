"""tools/make_random.py: its checkpoints have the released shapes and load as real ones do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen3_tg_numpy
from safetensors import safe_open

from tools import make_random

RELEASED = make_random.released_shapes()
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SMALL_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10}


def small(shape: str, **changes: Any) -> dict[str, Any]:
    config = {k: v for k, v in RELEASED[shape].items() if k not in ("generation_config", "_meta")}
    return config | SMALL | (SMALL_EXPERTS if "num_experts" in config else {}) | changes


@pytest.mark.parametrize("shape", RELEASED)
def test_every_shape_has_the_released_number_of_parameters(shape: str) -> None:
    expected = RELEASED[shape]["_meta"]["parameter_count_from_config"]
    assert make_random.size_bytes(RELEASED[shape]) == 2 * expected


@pytest.mark.parametrize("shard_bytes", [0, 10_000])
@pytest.mark.parametrize("dtype", make_random.TYPES)
@pytest.mark.parametrize("shape", ["Qwen3-0.6B", "Qwen3-8B", "Qwen3-30B-A3B"])
def test_a_checkpoint_loads_and_its_values_have_the_size_of_a_real_ones(
    tmp_path: Path, shape: str, dtype: str, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_random, "DRAWN_AT_ONCE", 1000)  # matrices in several parts
    config = small(shape, torch_dtype=dtype)
    make_random.write_weights(config, tmp_path, shard_bytes)
    make_random.write_json(tmp_path / "config.json", config)
    make_random.write_json(tmp_path / "generation_config.json", {})

    files = sorted(tmp_path.glob("*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, "numpy") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == make_random.tensor_shapes(config)
    assert (len(files) > 1) == (shard_bytes > 0)

    reference = qwen3_tg_numpy.load(tmp_path)
    logits = reference.logits(np.arange(SMALL["vocab_size"]))
    assert 0.5 < logits.std() < 2


def test_the_command_writes_all_that_a_user_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = {"Qwen3-30B-A3B": RELEASED["Qwen3-30B-A3B"] | small("Qwen3-30B-A3B")}
    monkeypatch.setattr(make_random, "released_shapes", lambda: released)
    out = tmp_path / "model"
    argv = ["make_random.py", "--shape", "Qwen3-30B-A3B", "--out", str(out), "--layers", "1"]
    monkeypatch.setattr("sys.argv", [*argv, "--experts", "3"])
    make_random.main()

    config = json.loads((out / "config.json").read_text())
    assert config == small("Qwen3-30B-A3B", num_hidden_layers=1, num_experts=3)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    template = (make_random.DATA / "chat_template.jinja").read_text(encoding="utf-8")
    texts = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert texts["chat_template"] == template
    assert (out / "tokenizer.json").stat().st_size == 11_422_654


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--layers", "0"], "at least 1"),
        (["--experts", "16"], "no experts"),
        (["--shard-gb", "-1"], "negative"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    error: str,
) -> None:
    out = tmp_path / "model"
    argv = ["make_random.py", "--shape", "Qwen3-0.6B", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*argv, *options])
    with pytest.raises(SystemExit, match="2"):
        make_random.main()
    assert error in capsys.readouterr().err
    assert not out.exists()
