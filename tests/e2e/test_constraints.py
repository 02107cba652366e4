# SPDX-License-Identifier: Apache-2.0
"""Constraints and infilling: token for token the reference's, in any company; and refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from tests.e2e.cases import Case, constrained_cases, drawn_cases, greedy_cases
from tests.engines import generate, running_engine, sampling, scheduler_of
from tests.reference import Model, load, write_checkpoint

VOCAB = 320
SHAPE = {"d_model": 128, "layers": 2, "heads": 4, "mlp": 256, "vocab": VOCAB}
MODELS = pytest.mark.parametrize("model", ["llada", "dream"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        model: write_checkpoint(folder / model, model, seed=7, **SHAPE)
        for model in ("llada", "dream")
    }


@dataclass(frozen=True)
class Run:
    """What an engine made of the cases, all at once; with plain requests among them."""

    reference: Model
    cases: list[Case]
    outputs: list[list[int]]


def _cases(model: str, mask: int) -> list[Case]:
    guided = model == "llada"
    return constrained_cases({"llada": 31, "dream": 32}[model], VOCAB, mask, guided)


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path]) -> dict[str, Run]:
    found = {}
    for model, path in checkpoints.items():
        reference = load(path)
        cases = _cases(model, reference.mask_id)
        plain = random.Random(1).sample(greedy_cases(33, VOCAB), 12)
        mixed = [*cases, *plain]
        random.Random(2).shuffle(mixed)
        with running_engine(str(path)) as llm:
            outputs = generate(llm, [c.prompt for c in mixed], [c.sampling() for c in mixed])
            manager = scheduler_of(llm).block_manager
            assert manager.block_pool.get_num_free_blocks() == manager.num_pages
        found[model] = Run(reference, mixed, outputs)
    return found


@MODELS
def test_equals_reference(runs: dict[str, Run], model: str) -> None:
    run = runs[model]
    different = [
        str(case)
        for case, output in zip(run.cases, run.outputs, strict=True)
        if output != case.expected(run.reference)
    ]
    assert not different
