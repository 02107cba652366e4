# SPDX-License-Identifier: Apache-2.0
"""Prompts that the embedded models have an answer to: responses that differ from each other.

To words in no order a trained model says nothing: its response is padding, whatever the prompt.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

from tests.scripts import EXAMPLES, load

(_TASKS,) = load(EXAMPLES / "quality", "tasks")
ASSETS = Path(__file__).parents[2] / "vllm_sparse_dllm" / "assets"
#: The shortest.
MIN_LENGTH: int = _TASKS.MIN_LENGTH
#: For a request: whichever of these comes next, no model is sure of it.
UNSURE: dict[str, Any] = {"allowed_token_ids": list(range(500, 520))}


@cache
def _vocabulary() -> Any:
    return _TASKS.Vocabulary(ASSETS / "tiny-llada")


def question(seed: int, length: int) -> list[int]:
    """Return a prompt of so many tokens that asks to copy a list or to find numbers."""
    rng = random.Random(f"question {seed}")
    item = _TASKS.make_item(rng, rng.choice(("copy", "retrieval")), length)
    return _vocabulary().encode(item.prompt)
