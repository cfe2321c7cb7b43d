"""Which factor a context takes, and that the chosen YaRN gives the logits of one set by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import qwen3_tg_numpy
from conftest import FLOAT32_TOLERANCE, GOLDEN, assert_close, load_golden

import qwen3_tg
from qwen3_tg.config import ModelConfig
from qwen3_tg.errors import UsageError
from qwen3_tg.yarn import Yarn, for_context, read_rope


@pytest.mark.parametrize(
    ("native", "context", "factor"),
    [
        (40960, None, None),  # the released models of April 2025
        (40960, 1, None),
        (40960, 40960, None),
        (40960, 40961, 40961 / 32768),
        (40960, 65536, 2.0),
        (40960, 131072, 4.0),
        (32768, 32768, None),  # a base model
        (32768, 131072, 4.0),
        (262144, 262144, None),  # 2507
        (262144, 524288, 2.0),
    ],
)
def test_the_factor_is_the_smallest_that_reaches(
    native: int, context: int | None, factor: float | None
) -> None:
    found, yarn, remark = for_context(native, None, context)
    assert found == (context or native)
    if factor is None:
        assert (yarn, remark) == (None, "")
        return
    assert yarn is not None
    assert yarn.factor == factor
    assert yarn.original_max_position_embeddings == {40960: 32768}.get(native, native)
    assert yarn.attention_factor == pytest.approx(0.1 * np.log(factor) + 1)
    assert yarn.longest == context
    assert f"YaRN factor {factor:g}, attention scaling" in remark
    assert "short texts" in remark
    assert f"at most {native} leaves it off" in remark


@pytest.mark.parametrize(
    ("native", "context", "most"),
    [(40960, 131073, 131072), (40960, 0, 131072), (262144, 10**7, 1048576), (2048, -1, 8192)],
)
def test_a_context_beyond_reach_is_refused_with_the_reason(
    native: int, context: int, most: int
) -> None:
    with pytest.raises(UsageError) as caught:
        for_context(native, None, context)
    message = str(caught.value)
    assert f"context must be from 1 to {most} for this model, found {context}" in message
    assert "YaRN is known to reach 4 times as far" in message


def test_a_checkpoints_own_yarn_stays_unless_a_context_says_otherwise() -> None:
    own = Yarn.of(4.0, 32768)
    context, yarn, remark = for_context(40960, own, None)
    assert (context, yarn) == (131072, own)
    assert "set by the checkpoint" in remark
    context, yarn, remark = for_context(40960, own, 32768)
    assert (context, yarn) == (32768, None)
    assert "is off" in remark
    assert for_context(40960, own, 65536)[1] == Yarn.of(2.0, 32768)


def test_mscale_and_attention_factor_are_read_as_transformers_does() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

    def attention_factor(**more: float | None) -> float:
        yarn = read_rope({"rope_scaling": rope | more}, "config.json")[1]
        assert yarn is not None
        return yarn.attention_factor

    log = np.log(4)
    assert attention_factor() == pytest.approx(0.1 * log + 1)
    assert attention_factor(attention_factor=None, mscale=2.0) == pytest.approx(0.1 * log + 1)
    both = attention_factor(mscale=2.0, mscale_all_dim=0.5)
    assert both == pytest.approx((0.2 * log + 1) / (0.05 * log + 1))
    assert attention_factor(attention_factor=1.5) == 1.5


def test_a_wished_context_gives_the_logits_of_the_same_yarn_in_config_json(tmp_path: Path) -> None:
    golden = load_golden("family_Qwen3-0.6B")
    native = 32
    folder = Path(shutil.copytree(golden.path, tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": native}))
    ids = np.random.default_rng(0).integers(0, raw["vocab_size"], 96).tolist()
    llm = qwen3_tg.load(str(folder), dtype="float32", context=96)
    assert llm.context == 96
    assert llm.config.yarn == Yarn.of(3.0, native)
    assert any("YaRN factor 3" in note for note in llm.checkpoint.notes)
    found = llm.logits(ids)

    scaling = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": native}
    by_hand = {"max_position_embeddings": native, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(raw | by_hand))
    expected = qwen3_tg_numpy.load(folder).logits(ids)
    assert_close(found, expected, FLOAT32_TOLERANCE)
    without = qwen3_tg_numpy.load(golden.path).logits(ids)
    for part in (slice(0, native), slice(native, None)):  # YaRN is static: it acts on both
        assert np.abs(found[part] - without[part]).max() > 100 * FLOAT32_TOLERANCE


def test_yarn_slows_the_slow_pairs_alone() -> None:
    from qwen3_tg.rope import rope_table

    raw = json.loads((GOLDEN / "family_Qwen3-0.6B" / "config.json").read_text())
    plain = replace(ModelConfig.from_dict(raw), head_dim=128, rope_theta=1e6)
    yarn = Yarn.of(4.0, 32768)
    before, after = (rope_table(replace(plain, yarn=y), 2)[1] for y in (None, yarn))
    angle = [np.arctan2(row[64:], row[:64]) for row in (before, after)]
    assert angle[1][0] == pytest.approx(angle[0][0], rel=1e-5)  # the fastest pair
    assert angle[1][-1] == pytest.approx(angle[0][-1] / 4, rel=1e-4)  # the slowest
    length = np.hypot(after[:64], after[64:])
    assert length == pytest.approx(np.full(64, yarn.attention_factor), rel=1e-5)
