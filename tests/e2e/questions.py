# SPDX-License-Identifier: Apache-2.0
"""Prompts that the embedded models can answer, so that responses differ from each other.

To random words, a trained model answers nothing: its response is padding, whatever the prompt.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

from tests.scripts import EXAMPLES, load

(_TASKS,) = load(EXAMPLES / "quality", "tasks")
ASSETS = Path(__file__).parents[2] / "vllm_sparse_dllm" / "assets"
#: Length of the shortest question.
MIN_LENGTH: int = _TASKS.MIN_LENGTH
#: Request parameters that allow only tokens of which no model is sure.
UNSURE: dict[str, Any] = {"allowed_token_ids": list(range(500, 520))}


@cache
def _vocabulary() -> Any:
    return _TASKS.Vocabulary(ASSETS / "tiny-llada")


def question(seed: int, length: int) -> list[int]:
    """Return a prompt of ``length`` tokens that asks to copy a list or to look up numbers."""
    rng = random.Random(f"question {seed}")
    item = _TASKS.make_item(rng, rng.choice(("copy", "retrieval")), length)
    return _vocabulary().encode(item.prompt)
