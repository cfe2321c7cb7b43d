"""The reference's generation: greedy against transformers, where it stops, what it draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import qwen3_tg_numpy
from qwen3_tg_numpy import Sampling
from qwen3_tg_numpy.sampling import sample

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def tied() -> tuple[qwen3_tg_numpy.Reference, list[int], list[int]]:
    """A model, a prompt, and its greedy continuation."""
    with np.load(GOLDEN / "tied_float32" / "golden.npz") as golden:
        ids, greedy_ids = golden["ids"].tolist(), golden["greedy_ids"].tolist()
    return qwen3_tg_numpy.load(GOLDEN / "tied_float32"), ids, greedy_ids


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(case):
    with np.load(GOLDEN / case / "golden.npz") as golden:
        ids, expected = golden["ids"], golden["greedy_ids"].tolist()
        assert golden["greedy_gaps"].min() > 1e-3  # else rounding could decide a token
    reference = qwen3_tg_numpy.load(GOLDEN / case)
    assert list(reference.generate_ids(ids, max_new_tokens=len(expected))) == expected


def test_the_stop_id_ends_the_text_and_is_not_given(tied):
    reference, ids, greedy_ids = tied
    stop = greedy_ids[9]
    found = list(reference.generate_ids(ids, max_new_tokens=24, stop_ids=[150, stop]))
    assert found == greedy_ids[: greedy_ids.index(stop)]


def test_a_stop_id_that_comes_first_gives_nothing(tied):
    reference, ids, greedy_ids = tied
    assert list(reference.generate_ids(ids, max_new_tokens=24, stop_ids={greedy_ids[0]})) == []


def test_by_default_the_end_tokens_of_the_checkpoint_stop_and_an_empty_set_does_not(tied, tmp_path):
    _, ids, greedy_ids = tied
    folder = Path(shutil.copytree(GOLDEN / "tied_float32", tmp_path / "model"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [greedy_ids[5]]}))
    reference = qwen3_tg_numpy.load(folder)
    first = greedy_ids.index(greedy_ids[5])
    assert list(reference.generate_ids(ids, max_new_tokens=24)) == greedy_ids[:first]
    assert list(reference.generate_ids(ids, max_new_tokens=24, stop_ids=())) == greedy_ids


@pytest.mark.parametrize("count", [0, 1, 7])
def test_max_new_tokens_counts_new_tokens_only(tied, count):
    reference, ids, greedy_ids = tied
    assert list(reference.generate_ids(ids, max_new_tokens=count)) == greedy_ids[:count]


def test_generation_ends_when_prompt_and_new_tokens_fill_the_context(tied):
    reference, ids, _ = tied
    prompt = (ids * 4)[:126]
    assert len(list(reference.generate_ids(prompt, max_new_tokens=24, stop_ids=()))) == 2
    assert list(reference.generate_ids((ids * 4)[:128], max_new_tokens=24, stop_ids=())) == []


def test_a_wrong_call_is_refused_at_the_call_and_not_at_the_first_token(tied):
    reference, ids, _ = tied
    with pytest.raises(ValueError, match="at least one id"):
        reference.generate_ids([], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        reference.generate_ids(ids, max_new_tokens=-1)


def test_tokens_come_one_at_a_time(tied):
    reference, ids, greedy_ids = tied
    stream = reference.generate_ids(ids, max_new_tokens=24)
    assert [next(stream), next(stream)] == greedy_ids[:2]


def test_sampled_tokens_are_what_uncached_logits_and_the_step_number_give(tied):
    reference, ids, _ = tied
    sampling = Sampling(temperature=1.3, top_k=50, top_p=0.95, min_p=0.01, seed=42)
    sequence = list(ids)
    for n in range(12):
        sequence.append(sample(reference.logits(sequence)[-1], sampling, n))
    found = list(reference.generate_ids(ids, max_new_tokens=12, sampling=sampling, stop_ids=()))
    assert found == sequence[len(ids) :]


def test_the_seed_alone_decides_between_two_sampled_texts(tied):
    reference, ids, greedy_ids = tied

    def text(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return list(reference.generate_ids(ids, max_new_tokens=16, sampling=sampling, stop_ids=()))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1) != greedy_ids[:16]


def test_the_prompt_is_not_changed(tied):
    reference, ids, _ = tied
    before = list(ids)
    list(reference.generate_ids(ids, max_new_tokens=3))
    assert ids == before
