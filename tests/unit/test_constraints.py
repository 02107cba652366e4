# SPDX-License-Identifier: Apache-2.0
"""Edits of logits, and commits that exclude each other, against the reference."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from tests.reference.decode import Options, completes, constrain, without_bad_words
from tests.unit.helpers import reference_model
from vllm_sparse_dllm.denoise.constraints import MASKED, BadWords
from vllm_sparse_dllm.engine.constraints import RequestConstraints

VOCAB, MASK, EOS = 12, 3, 1
TOKENS = [token for token in range(VOCAB) if token != MASK]
#: Few different tokens, so that responses often contain the words.
FEW = st.sampled_from(TOKENS[:4])
WORDS = st.lists(st.lists(FEW, min_size=1, max_size=4), min_size=1, max_size=6)
RESPONSES = st.lists(st.just(MASK) | FEW, min_size=1, max_size=12).filter(lambda r: MASK in r)
PENALTIES = st.sampled_from([0.0, 0.5, 1.5, -0.7])


def masked(response: list[int]) -> np.ndarray:
    """Return a response with masked positions as the package represents them."""
    return np.array([MASKED if token == MASK else token for token in response])


def candidates_of(response: list[int], data: st.DataObject) -> list[int]:
    """Return some of the masked positions, ascending."""
    places = [place for place, token in enumerate(response) if token == MASK]
    chosen = data.draw(st.sets(st.sampled_from(places), min_size=1))
    return sorted(chosen)


@settings(max_examples=200)
@given(WORDS, RESPONSES, st.data())
def test_forbidden_is_what_completes_a_word(
    words: list[list[int]], response: list[int], data: st.DataObject
) -> None:
    candidates = candidates_of(response, data)
    found = BadWords(map(tuple, words)).forbidden(masked(response), np.array(candidates))
    expected = {
        (row, token)
        for row, place in enumerate(candidates)
        for word in words
        for start in range(len(response))
        for token in word
        if start <= place < start + len(word) and completes(response, word, start, place, token)
    }
    assert set(zip(found.rows.tolist(), found.token_ids.tolist(), strict=True)) == expected


@settings(max_examples=200)
@given(WORDS, RESPONSES, st.data())
def test_commits_of_one_step_complete_no_word_together(
    words: list[list[int]], response: list[int], data: st.DataObject
) -> None:
    candidates = candidates_of(response, data)
    order = data.draw(st.permutations(range(len(candidates))))
    tokens = [data.draw(FEW) for _ in candidates]
    positions = np.array([candidates[row] for row in order])
    got = BadWords(map(tuple, words)).compatible(
        masked(response), positions, np.array([tokens[row] for row in order])
    )
    kept = without_bad_words(
        torch.tensor(tokens),
        torch.tensor(order),
        torch.tensor(candidates),
        torch.tensor(response),
        Options(bad_words=words),
    )
    assert [row for row, stands in zip(order, got.tolist(), strict=True) if stands] == kept.tolist()


def test_the_surest_commit_stands() -> None:
    words = BadWords([(5, 6)])
    response = np.full(2, MASKED)
    for positions, tokens in (([0, 1], [5, 6]), ([1, 0], [6, 5])):
        accepted = words.compatible(response, np.array(positions), np.array(tokens))
        assert accepted.tolist() == [True, False]
    assert (response == MASKED).all()


def test_a_word_that_is_there_already_is_nobodys_fault() -> None:
    """A canvas may already contain a bad word, which does not affect commits elsewhere."""
    response = np.array([5, 6, MASKED, MASKED])
    words = BadWords([(5, 6)])
    assert words.compatible(response, np.array([2, 3]), np.array([5, 7])).all()
    assert words.forbidden(response, np.array([2, 3])).rows.size == 0


@settings(max_examples=200)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    response=RESPONSES,
    words=st.just([]) | WORDS,
    allowed=st.none() | st.lists(st.sampled_from(range(VOCAB)), min_size=1, max_size=8),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 1.5, 4.0])),
    penalties=st.tuples(PENALTIES, PENALTIES, st.sampled_from([1.0, 0.5, 1.7])),
    min_tokens=st.integers(0, 12),
    part=st.integers(1, 5),
    data=st.data(),
)
def test_edits_are_the_references(
    prompt: list[int],
    response: list[int],
    words: list[list[int]],
    allowed: list[int] | None,
    bias: dict[int, float],
    penalties: tuple[float, float, float],
    min_tokens: int,
    part: int,
    data: st.DataObject,
) -> None:
    """All edits together, applied to the logits one part at a time."""
    candidates = candidates_of(response, data)
    presence, frequency, repetition = penalties
    sampling = SamplingParams(
        max_tokens=20,
        min_tokens=min_tokens,
        stop_token_ids=[7, 9],
        allowed_token_ids=allowed,
        logit_bias=bias or None,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
    )
    sampling._bad_words_token_ids = words or None
    sampling.all_stop_token_ids.add(EOS)
    options = Options(
        bad_words=words,
        allowed_token_ids=allowed,
        logit_bias=bias,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        min_tokens=min_tokens,
        stop_ids=[7, 9],
        eos_id=EOS,
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(len(candidates), VOCAB, generator=generator) * 3
    x = torch.tensor([*prompt, *response])
    model = reference_model("llada", VOCAB, MASK)
    expected = constrain(logits, torch.tensor(candidates), x, len(prompt), options, model)

    constraints = RequestConstraints.of(sampling, np.array(prompt), torch.device("cpu"))
    if constraints is not None:
        edits = constraints.edits(masked(response), np.array(candidates))
        for first in range(0, len(candidates), part):
            for edit in edits:
                edit.apply(logits[first : first + part], first)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_a_long_block_takes_no_more_memory() -> None:
    """Not so many numbers as it has candidates for each bad word and each stop token."""
    num, width = 20_000, 500
    sampling = SamplingParams(max_tokens=num, min_tokens=num, stop_token_ids=[*range(4, 404)])
    sampling._bad_words_token_ids = [[n] for n in range(4, 404)]
    constraints = RequestConstraints.of(sampling, np.array([1, 2]), torch.device("cpu"))
    assert constraints is not None
    candidates, logits = np.arange(num), torch.zeros(16, width)
    tracemalloc.start()
    edits = constraints.edits(masked([MASK] * num), candidates)
    for edit in edits:
        edit.apply(logits, 400)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 << 20
    assert logits.isinf().sum() == 16 * 400


def test_an_end_of_text_that_the_model_has_not() -> None:
    """A tokenizer's end-of-text id may lie outside the model's vocabulary: it is ignored."""
    sampling = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=[3])
    sampling.update_from_generation_config({}, eos_token_id=VOCAB + 5)
    constraints = RequestConstraints.of(sampling, np.array([1, 2]), torch.device("cpu"))
    assert constraints is not None
    logits = torch.zeros(2, VOCAB)
    for edit in constraints.edits(masked([MASK] * 4), np.array([1, 2])):
        edit.apply(logits, 0)
    assert logits[0, 3] == -torch.inf and logits.isinf().sum() == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "top_p": 0.5}, {"stop_token_ids": [4]}, {"min_p": 0.1}],
)
def test_plain_requests_have_no_constraints(options: dict[str, object]) -> None:
    sampling = SamplingParams(max_tokens=4, **options)  # type: ignore[arg-type]
    assert RequestConstraints.of(sampling, np.array([1, 2]), torch.device("cpu")) is None
