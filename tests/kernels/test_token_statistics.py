# SPDX-License-Identifier: Apache-2.0
"""Statistics of rows of logits against a plain softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import twins
from vllm_sparse_dllm.kernels.token_statistics import negative_entropy, token_statistics


@st.composite
def rows(draw: st.DrawFn):
    """Rows that are parts of wider ones; some have ties, near-certain or excluded tokens."""
    vocab, num = draw(st.integers(2, 300)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = torch.randn(num, vocab + 8, generator=generator) * draw(st.sampled_from([1, 30]))
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()):
        logits[:, draw(st.integers(0, vocab - 1))] += 40
    if draw(st.booleans()):
        logits[0, torch.randperm(vocab, generator=generator)[: vocab - 2]] = -math.inf
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return logits.to(dtype)[:, :vocab], draw(st.integers(0, vocab - 1))


def compare(logits: torch.Tensor, mask_id: int, device: torch.device, **tiles: int) -> None:
    expected = twins.statistics(logits, mask_id)
    got = token_statistics(logits.to(device), mask_id, **tiles)
    assert torch.equal(got.tokens.cpu(), expected["tokens"])
    index = torch.arange(len(logits) - 1, -1, -1, device=device)
    entropy = negative_entropy(logits.to(device), got, index, **tiles)
    for own, name in (
        (got.probability, "probability"),
        (got.margin, "margin"),
        (entropy.flip(0), "negative_entropy"),
    ):
        torch.testing.assert_close(
            own.cpu().double(), expected[name], rtol=2e-6, atol=1e-6, equal_nan=True
        )


@given(drawn=rows(), tiles=st.sampled_from([(16384, 2048), (64, 16), (128, 128)]))
def test_statistics(drawn, tiles: tuple[int, int], device: torch.device) -> None:
    logits, mask_id = drawn
    compare(logits, mask_id, device, piece=tiles[0], block=tiles[1])


def test_a_row_of_several_pieces(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    compare(torch.randn(2, 40000, generator=generator).bfloat16(), 7, device)


def test_the_first_of_equal_tokens_but_not_the_mask(device: torch.device) -> None:
    logits = torch.zeros(2, 100, device=device)
    logits[0, [17, 40, 80]] = 3.0
    for mask_id, token in ((17, 40), (40, 17), (5, 17)):
        got = token_statistics(logits, mask_id, piece=32, block=16)
        assert got.tokens.tolist() == [token, 0]
        assert got.margin.tolist() == [0.0, 0.0]


def test_sure_tokens_are_told_apart_near_one(device: torch.device) -> None:
    """A probability is a quotient, not the exponential of a difference of logarithms."""
    logits = torch.full((3, 50), -80.0, device=device)
    logits[:, 9] = 900.0
    logits[:, 3] = torch.tensor([885.0, 886.0, 880.0], device=device)
    probability = token_statistics(logits, 0).probability
    assert torch.equal(probability, torch.softmax(logits, dim=-1)[:, 9])
    assert probability[1] < probability[0] < probability[2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 20, 99])
def test_an_unusable_row_is_known_by_its_probability(
    bad: float, place: int, device: torch.device
) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(3)).to(device)
    logits[1, place] = bad
    got = token_statistics(logits, 4, piece=32, block=16)
    assert torch.isfinite(got.probability).tolist() == [True, False, True]
    assert ((got.tokens >= 0) & (got.tokens < 100)).all()
    expected = twins.statistics(logits.cpu(), 4)["tokens"]
    assert torch.equal(got.tokens.cpu()[[0, 2]], expected[[0, 2]])


def test_a_row_without_a_token_is_unusable(device: torch.device) -> None:
    logits = torch.full((1, 40), -math.inf, device=device)
    got = token_statistics(logits, 3, piece=32, block=16)
    assert torch.isnan(got.probability).all() and got.tokens.tolist() == [0]


def test_no_rows(device: torch.device) -> None:
    logits = torch.zeros(0, 40, device=device)
    got = token_statistics(logits, 3)
    assert got.tokens.shape == got.probability.shape == (0,)
    assert negative_entropy(logits, got, got.tokens).shape == (0,)


def test_rows_do_not_depend_on_the_batch(device: torch.device) -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(4)).to(device)
    together, alone = token_statistics(logits, 0), token_statistics(logits[3:4], 0)
    assert torch.equal(together.probability[3:4], alone.probability)
    assert torch.equal(together.margin[3:4], alone.margin)
