# SPDX-License-Identifier: Apache-2.0
"""The engine gives the slow reference's tokens, in float32.

All cases of a checkpoint run in one engine at the same time, so that every batch is mixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cases import Case, beyond_cases, drawn_cases, greedy_cases, saliency_cases
from tests.engines import generate, pool_is_whole, running_engine
from tests.reference import Model, load, write_checkpoint
from tests.reference.checkpoints import special_ids
from vllm_sparse_dllm.assets import embedded_model

VOCAB = 320
MASK = special_ids(VOCAB)["mask"]


@dataclass(frozen=True)
class Checkpoint:
    """A random checkpoint and the cases to run on it."""

    model: str
    shape: dict[str, Any]
    cases: list[Case]


def _cases(seed: int, model: str) -> list[Case]:
    guided = model == "llada"
    every = 1 if seed in (1, 3) else 3
    return (
        greedy_cases(seed, VOCAB)
        + drawn_cases(seed, VOCAB, guided)
        + beyond_cases(seed, VOCAB, guided)[::every]
        + saliency_cases(seed, VOCAB, guided)
        + beyond_cases(seed + 40, VOCAB, guided, MASK)[:: 4 * every]
    )


CHECKPOINTS = {
    "llada": Checkpoint(
        "llada", {"d_model": 128, "layers": 3, "heads": 4, "mlp": 256}, _cases(1, "llada")
    ),
    "llada-gqa": Checkpoint(
        "llada",
        {"d_model": 192, "layers": 2, "heads": 6, "kv_heads": 2, "mlp": 320},
        _cases(2, "llada"),
    ),
    "dream": Checkpoint(
        "dream",
        {"d_model": 128, "layers": 3, "heads": 4, "kv_heads": 2, "mlp": 256},
        _cases(3, "dream"),
    ),
    # Head size 48, which vLLM's CPU kernel does not support: the portable attention runs.
    "dream-odd-heads": Checkpoint(
        "dream",
        {"d_model": 144, "layers": 2, "heads": 3, "kv_heads": 1, "mlp": 256},
        _cases(4, "dream"),
    ),
}
PARAMETERS = [
    pytest.param(name, number, id=f"{name}-{case}")
    for name, checkpoint in CHECKPOINTS.items()
    for number, case in enumerate(checkpoint.cases)
]


@dataclass(frozen=True)
class Run:
    """The engine's responses to a checkpoint's cases, and the reference model."""

    reference: Model
    outputs: list[list[int]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """Return each checkpoint's run, which is made on first access."""
    yield _Runs(tmp_path_factory.mktemp("checkpoints"))


class _Runs(dict[str, Run]):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Run:
        checkpoint = CHECKPOINTS[name]
        path = write_checkpoint(
            self.folder / name, checkpoint.model, vocab=VOCAB, seed=7, **checkpoint.shape
        )
        with running_engine(str(path)) as llm:
            outputs = generate(
                llm,
                [case.prompt for case in checkpoint.cases],
                [case.sampling() for case in checkpoint.cases],
            )
            assert pool_is_whole(llm)
        self[name] = Run(load(path), outputs)
        return self[name]


#: Relative error of a confidence: float32 has 24 bits, and sums of some hundred numbers lose a few.
ROUNDING = 2e-6


@pytest.mark.parametrize(("name", "number"), PARAMETERS)
def test_equals_reference(runs: dict[str, Run], name: str, number: int) -> None:
    case = CHECKPOINTS[name].cases[number]
    run = runs[name]
    expected = case.expected(run.reference)
    if run.outputs[number] != expected and case.closest_call(run.reference) < ROUNDING:
        pytest.skip("two places are as good up to rounding, which differs between processors")
    assert run.outputs[number] == expected


def test_embedded_model_equals_reference() -> None:
    """The trained model has confidences close to 1, with many near ties."""
    path = embedded_model()
    vocab = 1400
    cases = greedy_cases(11, vocab)[::2] + drawn_cases(12, vocab, guided=True)[::3]
    cases += beyond_cases(13, vocab, guided=True)[::4] + saliency_cases(14, vocab, guided=True)
    with running_engine(path) as llm:
        outputs = generate(llm, [c.prompt for c in cases], [c.sampling() for c in cases])
    reference = load(path)
    different = [
        str(case)
        for case, output in zip(cases, outputs, strict=True)
        if output != case.expected(reference)
    ]
    assert not different
