# SPDX-License-Identifier: Apache-2.0
"""Checks of schemas, what is removed from a grammar's mask, and how a mask acts on logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_sparse_dllm.denoise.constraints import AllowMask
from vllm_sparse_dllm.engine.structured_output import AllowedTokens, check_schema, has_grammar

VOCAB, WORDS = 70, 3
EOS, STOP, SPECIAL, MASK = 0, 31, 32, 63
IN_TEXT = {5, 33, 64, 69}


@pytest.mark.parametrize("value", [5, "x", None, {}, [], [7], [{"minimum": 1}]])
def test_schemas_with_odd_parts_are_left_to_the_backend(value: Any) -> None:
    check_schema({"allOf": value, "minimum": 2}, "structural_tag")


def test_bounds_of_all_parts_count() -> None:
    with pytest.raises(ValueError, match="minimum in json must be from"):
        check_schema({"allOf": [{"minimum": 2**60}]}, "json")


def pack(token_ids: set[int]) -> np.ndarray:
    """Return a mask in the layout of the grammar backends."""
    row = np.zeros(WORDS, dtype=np.int64)
    for token_id in token_ids:
        row[token_id // 32] += 1 << token_id % 32
    return row.astype(np.uint32).view(np.int32)


def unpack(row: np.ndarray) -> set[int]:
    assert row.dtype == np.int32 and row.shape == (WORDS,)
    return {i for i in range(32 * WORDS) if int(row[i // 32]) >> (i % 32) & 1}


class Manager:
    """Stands in for vLLM's manager; every grammar allows the same tokens."""

    def __init__(self, token_ids: set[int] | None) -> None:
        row = np.full(WORDS, -1, np.int32) if token_ids is None else pack(token_ids)
        self.rows = np.stack([row] * 4)
        added = {
            SPECIAL: SimpleNamespace(content="<s>", special=True),
            33: SimpleNamespace(content="<t>", special=False),
        }
        self.tokenizer = SimpleNamespace(
            added_tokens_decoder=added,
            all_special_ids=[EOS, MASK],
            convert_ids_to_tokens=lambda ids: [f"<{token_id}>" for token_id in ids],
        )

    def grammar_bitmask(self, requests: Any, ids: list[str], drafts: Any) -> np.ndarray:
        assert list(requests) == ids and not drafts
        return self.rows[: len(ids)]


def request(name: str = "a", delivered: tuple[int, ...] = (), **grammar: Any) -> Any:
    sampling = SamplingParams(stop_token_ids=[STOP])
    sampling.update_from_generation_config({}, EOS)
    default = {"is_terminated": lambda: False, "printed_error": False}
    return SimpleNamespace(
        request_id=name,
        sampling_params=sampling,
        structured_output_request=SimpleNamespace(grammar=SimpleNamespace(**default | grammar)),
        num_output_tokens=len(delivered),
        output_token_ids=list(delivered),
    )


def allowed(token_ids: set[int] | None, given_request: Any, num_committed: int = 0) -> set[int]:
    """Return what a request can commit if its grammar allows ``token_ids``, None for all."""
    manager: Any = Manager(token_ids)
    before = manager.rows.copy()
    masks = AllowedTokens(manager, MASK).next_masks([given_request], {"a": num_committed})
    # The manager's buffer must not be modified.
    assert (manager.rows == before).all()
    return unpack(masks[0])


@pytest.mark.parametrize(
    ("by_grammar", "expected"),
    [
        (IN_TEXT, IN_TEXT),
        (IN_TEXT | {MASK}, IN_TEXT),
        (IN_TEXT | {SPECIAL}, IN_TEXT),
        (IN_TEXT | {EOS}, IN_TEXT | {EOS}),
        # A grammar can allow a stop token as text; it stays only if the text can also end here.
        (IN_TEXT | {STOP}, IN_TEXT),
        (IN_TEXT | {STOP, EOS}, IN_TEXT | {STOP, EOS}),
        ({MASK}, set()),
        (set(), set()),
    ],
)
def test_what_a_grammar_allows(by_grammar: set[int], expected: set[int]) -> None:
    assert allowed(by_grammar, request()) == expected


def test_special_tokens_that_the_text_shows_are_allowed() -> None:
    shown = request()
    shown.sampling_params.skip_special_tokens = False
    assert allowed({5, SPECIAL, MASK}, shown) == {5, SPECIAL}


def test_before_the_end_of_reasoning_everything_but_the_mask_id_is_allowed() -> None:
    assert allowed(None, request()) == set(range(32 * WORDS)) - {MASK}


def test_behind_the_end_only_stop_tokens_are_allowed() -> None:
    assert allowed(None, request(is_terminated=lambda: True)) == {EOS, STOP}


def test_a_grammar_that_its_backend_gave_up_allows_nothing() -> None:
    """llguidance's mask then has the end of the text, although the text is not complete."""
    assert allowed({EOS}, request(printed_error=True)) == set()


def test_what_was_delivered_is_repeated() -> None:
    again = request(delivered=(64, 5))
    assert [allowed(IN_TEXT, again, n) for n in range(3)] == [{64}, {5}, IN_TEXT]


def test_each_request_has_its_own_mask() -> None:
    manager: Any = Manager(IN_TEXT)
    requests = [request("a"), request("b", delivered=(7,)), request("c", printed_error=True)]
    masks = AllowedTokens(manager, MASK).next_masks(requests, {"a": 0, "b": 0, "c": 0})
    assert [unpack(row) for row in masks] == [IN_TEXT, {7}, set()]


def test_parameters_without_a_constraint_are_none() -> None:
    assert not has_grammar(SamplingParams())
    structured = StructuredOutputsParams(regex="a")
    assert has_grammar(SamplingParams(structured_outputs=structured))
    structured.regex = None
    assert not has_grammar(SamplingParams(structured_outputs=structured))


@given(st.sets(st.integers(0, 32 * WORDS - 1)), st.integers(1, 32 * WORDS + 9))
def test_a_mask_leaves_what_it_allows(token_ids: set[int], vocab: int) -> None:
    """Tokens beyond the end of the mask are not allowed."""
    logits = torch.randn(2, vocab)
    expected = logits.clone()
    expected[:, [i for i in range(vocab) if i not in token_ids]] = -torch.inf
    AllowMask(pack(token_ids)).apply(logits, 0)
    assert torch.equal(logits, expected)
