# SPDX-License-Identifier: Apache-2.0
"""Structured output: the tokens that a grammar allows next, for requests written left to right.

A grammar reads a text from its start, so a constrained request commits its first masked
position in every step, and nothing else. vLLM's manager compiles the grammars and advances them
with the delivered tokens; this module does the rest.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_sparse_dllm.settings import FIELDS, REQUEST_PREFIX

#: The backend if the user names none. It refuses most of what it cannot enforce (`check_schema`
#: the rest); vLLM's own default compiles every request with the backend that the first one needed.
DEFAULT_BACKEND: Final = "guidance"

#: Settings of how many positions a step commits, and which, with their neutral values.
_ORDER_OF_COMMITS = {
    "steps": None,
    "remasking": None,
    "threshold": None,
    "factor": None,
    "alg_temp": 0.0,
}
#: vLLM's parameters that would make the text go on after its end, with their neutral values.
_END_OF_TEXT = {"ignore_eos": False, "min_tokens": 0}
#: Fields of vLLM's `StructuredOutputsParams` that the engine takes only from its own options.
_ENGINE_OPTIONS = {
    "disable_any_whitespace": False,
    "disable_additional_properties": False,
    "whitespace_pattern": None,
}

#: Most characters of a backend's error that are passed on.
_LONGEST_ERROR = 200
#: Keywords of a JSON schema that bound a number, lower and upper; the first excludes the bound.
_BOUNDS = (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum"))
#: llguidance stores numbers as floats, and truncates bounds to 64 bits.
_LARGEST_NUMBER = 2**53
#: Keywords of a JSON schema whose values are data, not schemas.
_DATA = ("default", "examples")
#: Keywords whose values are data that the text must equal.
_LITERALS = ("const", "enum")
#: Keywords whose values map names to schemas; the names are not keywords.
_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def has_grammar(sampling: SamplingParams) -> bool:
    """Return whether a request's text must follow a grammar."""
    params = sampling.structured_outputs
    return params is not None and not params.all_constraints_none()


def check_structured_output(sampling: SamplingParams) -> None:
    """Refuse parameters that conflict with a grammar, and schemas that would not be enforced.

    Raises:
        ValueError: Naming the parameter, its value and what is allowed.
    """
    if not has_grammar(sampling):
        return
    given = sampling.extra_args or {}
    for name, neutral in _ORDER_OF_COMMITS.items():
        key = REQUEST_PREFIX + name
        if key in given and FIELDS[name].parse(key, given[key]) != neutral:
            raise ValueError(
                f"{key} must be {_in_json(neutral)} with structured_outputs, which commits one "
                f"token a step from left to right, got {given[key]!r}"
            )
    canvas = given.get(f"{REQUEST_PREFIX}canvas")
    if canvas is not None:
        raise ValueError(
            f"{REQUEST_PREFIX}canvas must not be set with structured_outputs, whose grammar "
            f"cannot see what follows, got {reprlib.repr(canvas)}"
        )
    for name, neutral in _END_OF_TEXT.items():
        value = getattr(sampling, name)
        if value != neutral:
            raise ValueError(
                f"{name} must be {neutral} with structured_outputs, where the grammar says where "
                f"the text may end, got {value!r}"
            )
    for name, default in _ENGINE_OPTIONS.items():
        value = getattr(sampling.structured_outputs, name)
        if value != default:
            raise ValueError(
                f"structured_outputs.{name} must be {default} in a request, got {value!r}; it is "
                "an option of the engine (structured_outputs_config)"
            )
    _check_end_of_text(sampling)
    assert sampling.structured_outputs is not None
    # Structural tags are grammars by now, or belong to other backends.
    schema = sampling.structured_outputs.json
    if schema is not None:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        check_schema(schema, "structured_outputs.json")


def _check_end_of_text(sampling: SamplingParams) -> None:
    """Refuse constraints that forbid every token with which the text could end."""
    ends = set(sampling.all_stop_token_ids)
    if not ends:
        return
    words = sampling.bad_words_token_ids or ()
    possible = ends - {word[0] for word in words if len(word) == 1}
    if not possible:
        raise ValueError(
            "bad_words must leave a token that ends the text with structured_outputs (one of "
            f"{sorted(ends)}), got {reprlib.repr(sampling.bad_words)}"
        )
    allowed = sampling.allowed_token_ids
    if allowed is not None and possible.isdisjoint(allowed):
        raise ValueError(
            "allowed_token_ids must hold a token that ends the text with structured_outputs (one "
            f"of {sorted(possible)}), got {reprlib.repr(allowed)}"
        )


def check_schema(schema: Any, field: str) -> None:
    """Refuse what llguidance accepts in a schema but does not enforce.

    Args:
        schema: A schema, or a value that contains schemas.
        field: The request's field that it is part of.

    Raises:
        ValueError: Naming the keyword, its value and what is allowed.
    """
    if isinstance(schema, list):
        for part in schema:
            check_schema(part, field)
    if not isinstance(schema, dict):
        return
    if "x-guidance" in schema:
        raise ValueError(
            f"x-guidance in {field} must not be set, whose options pass over parts of a schema, "
            f"got {reprlib.repr(schema['x-guidance'])}"
        )
    _check_bounds(schema, field)
    fewest, required = schema.get("minProperties", 0), schema.get("required", ())
    most = max(1, len(required)) if isinstance(required, list) else 1
    if _is_number(fewest) and fewest > most:
        raise ValueError(
            f"minProperties in {field} must be at most {most} (1, or the properties that are "
            f"required: others may repeat a name), got {fewest}"
        )
    for key, value in schema.items():
        if key in _LITERALS:
            _check_literals(value, key, field)
        elif key in _BY_NAME and isinstance(value, dict):
            check_schema(list(value.values()), field)
        elif key not in _DATA:
            check_schema(value, field)


def _check_bounds(schema: dict[str, Any], field: str) -> None:
    """Refuse bounds of a number that llguidance would change or ignore."""
    parts = schema.get("allOf")
    # Whatever else it may be is refused by vLLM or the backend.
    parts = parts if isinstance(parts, list) else []
    own = [schema, *(part for part in parts if isinstance(part, dict))]
    bounds: list[list[float]] = []
    whole: list[tuple[str, float]] = []
    for keywords in _BOUNDS:
        bounds.append([])
        for key in keywords:
            for value in (part[key] for part in own if _is_number(part.get(key))):
                if not abs(value) <= _LARGEST_NUMBER:
                    raise ValueError(f"{key} in {field} must be from -2**53 to 2**53, got {value}")
                bounds[-1].append(value)
                if key == keywords[0] and value == int(value):
                    whole.append((key, value))
    for key, value in whole:
        # Here llguidance's regular expression lets the excluded number itself through.
        if any(0 < abs(other - value) < 1 for side in bounds for other in side):
            raise ValueError(
                f"{key} in {field} must be no whole number where the other bound is less than 1 "
                f"away, got {value}"
            )


def _check_literals(value: Any, key: str, field: str) -> None:
    """Refuse numbers that llguidance would write as other numbers."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            _check_literals(part, key, field)
    elif _is_number(value) and not abs(value) <= _LARGEST_NUMBER:
        raise ValueError(f"numbers of {key} in {field} must be from -2**53 to 2**53, got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _in_json(value: Any) -> str:
    return "null" if value is None else repr(value)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of a tokenizer's special tokens by name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {token.content: token_id for token_id, token in added.items() if token.special}
    ids = tokenizer.all_special_ids
    return named | dict(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True))


class AllowedTokens:
    """The tokens that constrained requests may commit next, as bit masks.

    A mask is ``[ceil(vocab / 32)]`` int32 with token i as bit i % 32 of word i // 32, as in the
    grammar backends. If no bit is set, no token can follow and the request fails.

    Args:
        manager: vLLM's manager, which has the grammars.
        mask_token_id: The mask id, which is never allowed.
    """

    def __init__(self, manager: StructuredOutputManager, mask_token_id: int) -> None:
        self._manager = manager
        self._mask_token_id = mask_token_id
        self._special: np.ndarray | None = None

    def next_masks(self, requests: list[Request], num_committed: Mapping[str, int]) -> np.ndarray:
        """Return the mask of each request's next token, ``[requests, words]``.

        Args:
            requests: Constrained requests whose grammars are compiled, at least one.
            num_committed: Tokens committed on the canvas, by request id. While a request is
                computed again after a preemption they are fewer than it has delivered; it then
                repeats the delivered ones.
        """
        ids = [request.request_id for request in requests]
        rows = self._manager.grammar_bitmask({r.request_id: r for r in requests}, ids, {})
        assert rows is not None
        masks = rows.copy()
        for request, row in zip(requests, masks, strict=True):
            position = num_committed[request.request_id]
            if position < request.num_output_tokens:
                row[:] = _bits([request.output_token_ids[position]], len(row))
            else:
                row[:] = self._corrected(request, row)
        return masks

    @staticmethod
    def problem(request: Request) -> str | None:
        """Return why a request's grammar could not be followed, None if it could."""
        structured = request.structured_output_request
        grammar: Any = structured.grammar if structured is not None else None
        if isinstance(grammar, Exception):
            error = str(grammar)
        elif getattr(grammar, "printed_error", False):
            error = grammar.ll_matcher.get_error()
        else:
            return None
        told = error.strip().partition("\n")[0][:_LONGEST_ERROR]
        return f"structured_outputs must be a grammar that its backend can follow: {told}"

    def _corrected(self, request: Request, row: np.ndarray) -> np.ndarray:
        """Remove tokens that must not be committed from a grammar's mask."""
        sampling, structured = request.sampling_params, request.structured_output_request
        assert sampling is not None and structured is not None
        grammar: Any = structured.grammar
        # All bits are set after the end of the text and before the end of reasoning.
        applies = bool((row != -1).any())
        row &= ~_bits([self._mask_token_id], len(row))
        stops = _bits(sampling.all_stop_token_ids, len(row))
        if grammar.is_terminated():
            return row & stops
        if getattr(grammar, "printed_error", False):
            # The grammar is too complex to follow; its backend would end the text here.
            return np.zeros_like(row)
        if applies:
            if sampling.skip_special_tokens:
                # A special token's name may match the grammar, but would not be in the text.
                row &= ~(self._special_tokens(len(row)) & ~stops)
            if sampling.eos_token_id is None or not _has_bit(row, sampling.eos_token_id):
                others = row & ~stops
                # If only tokens of `stop_token_ids` can follow, one of them cuts the text short.
                row = others if others.any() else row
        return row

    def _special_tokens(self, num_words: int) -> np.ndarray:
        if self._special is None:
            self._special = _bits(special_tokens(self._manager.tokenizer).values(), num_words)
        return self._special


def _bits(token_ids: Iterable[int], num_words: int) -> np.ndarray:
    """Return ``[num_words]`` int32 with the bits of the given tokens; larger ids have none."""
    words = np.zeros(num_words, dtype=np.uint32)
    for token_id in token_ids:
        if token_id < 32 * num_words:
            words[token_id // 32] |= np.uint32(1 << token_id % 32)
    return words.view(np.int32)


def _has_bit(row: np.ndarray, token_id: int) -> bool:
    return bool((row & _bits([token_id], len(row))).any())
