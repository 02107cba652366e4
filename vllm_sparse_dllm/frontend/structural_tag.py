# SPDX-License-Identifier: Apache-2.0
"""Structural tags (free text with schemas between tags), written out as one grammar.

vLLM's own translation for llguidance treats every trigger in angle brackets as a special token, and
wraps schemas so that nothing in them is enforced. So admission replaces the structural tag by the
grammar that it stands for, and vLLM compiles that.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.config import StructuredOutputsConfig
from vllm.sampling_params import SamplingParams, check_json_nesting
from vllm.v1.structured_output.backend_guidance import process_for_additional_properties

from vllm_sparse_dllm.engine.structured_output import check_schema, special_tokens

_FIELD = "structured_outputs.structural_tag"
_BACKEND = "guidance"


def write_out(
    sampling: SamplingParams, config: StructuredOutputsConfig, tokenizer: Any
) -> SamplingParams:
    """Return a request's parameters with a grammar in place of a structural tag.

    Args:
        sampling: The parameters as given; not modified.
        config: The engine's options. Backends other than llguidance have forms of their own,
            which are left unchanged.
        tokenizer: The model's tokenizer; without one, vLLM refuses the request later.

    Raises:
        ValueError: Naming the field, its value and what is allowed.
    """
    structured = sampling.structured_outputs
    if structured is None or structured.structural_tag is None:
        return sampling
    if tokenizer is None or not config.backend.startswith(_BACKEND):
        return sampling
    check_json_nesting(structured.structural_tag, structural_tag=True)
    tags = _tags(structured.structural_tag)
    special = special_tokens(tokenizer)
    hidden = special.keys() & {tag["trigger"] for tag in tags}
    if hidden and sampling.skip_special_tokens:
        raise ValueError(
            f"triggers of {_FIELD} must be no special tokens unless skip_special_tokens is "
            f"False, got {min(hidden)!r}"
        )
    options = {"whitespace_flexible": not config.disable_any_whitespace}
    for tag in tags:
        if config.disable_additional_properties:
            tag["schema"] = process_for_additional_properties(tag["schema"])
        tag["schema"] = {**tag["schema"], "x-guidance": options}
    sampling = sampling.clone()
    sampling.structured_outputs = replace(
        structured, structural_tag=None, grammar=_grammar(tags, special)
    )
    return sampling


def _tags(text: Any) -> list[dict[str, Any]]:
    """Return the tags, each with its ``trigger``, ``begin``, ``schema`` and ``end``."""
    try:
        given = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_FIELD} must be JSON, got {reprlib.repr(text)}: {error}") from None
    if not isinstance(given, dict) or not given.keys() >= {"structures", "triggers"}:
        raise ValueError(
            f"{_FIELD} must be an object with structures and triggers for the backend "
            f"{_BACKEND}, got {reprlib.repr(given)}"
        )
    triggers, structures = given["triggers"], given["structures"]
    if not _is_list(triggers, lambda trigger: isinstance(trigger, str) and trigger):
        raise ValueError(
            f"triggers of {_FIELD} must be a list of strings, none empty, "
            f"got {reprlib.repr(triggers)}"
        )
    if not _is_list(structures, _is_structure):
        raise ValueError(
            f"structures of {_FIELD} must be a list, not empty, of objects with the strings begin "
            f"and end and the object schema, got {reprlib.repr(structures)}"
        )
    tags = []
    for structure in structures:
        begin = structure["begin"]
        trigger = next(filter(begin.startswith, triggers), None)
        if trigger is None:
            raise ValueError(
                f"begin in {_FIELD} must begin with one of the triggers "
                f"{reprlib.repr(triggers)}, got {begin!r}"
            )
        check_schema(structure["schema"], _FIELD)
        tags.append({**structure, "trigger": trigger})
    return tags


def _is_list(value: Any, allowed: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(allowed, value))


def _is_structure(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("begin"), str)
        and isinstance(value.get("end"), str)
        and isinstance(value.get("schema"), dict)
    )


def _grammar(tags: list[dict[str, Any]], special: Mapping[str, int]) -> str:
    """Return the grammar for llguidance: any text, in which a trigger has to begin a tag.

    Args:
        tags: As `_tags` returns them.
        special: Ids of the tokenizer's special tokens by name.
    """
    rules = [
        "%llguidance {}",
        f"start: ({' | '.join(f'tag_{n}' for n in range(len(tags)))})* TEXT",
        r"TEXT: /(.|\n)*/",
    ]
    for number, tag in enumerate(tags):
        trigger = tag["trigger"]
        if trigger in special:
            head = f"TEXT <[{special[trigger]}]>"
        else:
            # Lazy: the text before it ends at the first occurrence of the trigger.
            head = f"trigger_{number}"
            rules.append(f"{head}[lazy]: TEXT {_literal(trigger)}")
        rest = _literal(tag["begin"][len(trigger) :])
        schema, end = json.dumps(tag["schema"]), _literal(tag["end"])
        rules.append(f"tag_{number}: {head} {rest} %json {schema} {end}")
    return "\n".join(rules)


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""
