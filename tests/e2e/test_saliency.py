# SPDX-License-Identifier: Apache-2.0
"""A saliency from outside the package gets the right inputs, and its choice is what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM

from tests.engines import generate, running_engine, sampling
from tests.reference import write_checkpoint
from tests.reference.checkpoints import special_ids
from vllm_sparse_dllm.cache.saliency import (
    Saliency,
    SaliencyInputs,
    register_saliency,
    unregister_saliency,
)

VOCAB, LAYERS, HEADS, BLOCK = 320, 2, 2, 8
MASK = special_ids(VOCAB)["mask"]
PROMPTS = [[7 + i for i in range(length)] for length in (20, 41)]


class Earliest(Saliency):
    """Ranks by position, the first highest, and records its inputs."""

    name = "earliest"

    def __init__(self) -> None:
        self.seen: list[SaliencyInputs] = []
        self.masks: list[int] = []

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        self.seen.append(inputs)
        self.masks.append(int(inputs.canvas.masked.sum()))
        positions = np.concatenate([np.arange(*span) for span in inputs.candidates])
        return -torch.from_numpy(positions).to(inputs.keys)


@pytest.fixture(scope="module")
def earliest() -> Iterator[Earliest]:
    saliency = Earliest()
    register_saliency(saliency)
    yield saliency
    unregister_saliency(saliency.name)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, earliest: Earliest) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("model") / "llada"
    write_checkpoint(
        path, "llada", vocab=VOCAB, d_model=64, layers=LAYERS, heads=HEADS, mlp=96, seed=7
    )
    with running_engine(str(path)) as engine:
        yield engine


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("granularity", ["token", "page"])
def test_its_choice_is_kept(llm: LLM, earliest: Earliest, late: int, granularity: str) -> None:
    earliest.seen.clear()
    earliest.masks.clear()
    settings: dict[str, Any] = {
        "diffusion_block_length": BLOCK,
        "diffusion_delay_steps": 1,
        "diffusion_eviction_delay": late,
        "diffusion_granularity": granularity,
        "diffusion_kernel_size": 1,
        "diffusion_keep_ratio": 0.7,
    }
    asked = sampling(2 * BLOCK, diffusion_saliency="earliest", diffusion_trace=2, **settings)
    plain = sampling(2 * BLOCK, **settings)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS for _ in range(2)]
    outputs = llm.generate(prompts, [asked, plain] * len(PROMPTS), use_tqdm=False)
    kind = "evict" if late else "refresh"
    for prompt, output in zip(PROMPTS, outputs[::2], strict=True):
        changes = output.outputs[0].diffusion_trace["refreshes"]
        changes = [change for change in changes if change["kind"] == kind]
        seen = [i for i in earliest.seen if i.canvas.request_id.startswith(output.request_id)]
        assert len(changes) == 2 and len(seen) == 2 * LAYERS
        for number, change in enumerate(changes):
            start = len(prompt) + number * BLOCK
            total = len(prompt) + 2 * BLOCK
            others = [p for p in range(total) if not start <= p < start + BLOCK]
            keep = int(len(others) * 0.7)
            if granularity == "page":
                keep = min(-(-keep // 32) * 32, len(others))
            assert change["kept"] == [others[:keep]] * LAYERS
            for layer, inputs in enumerate(seen[number * LAYERS : (number + 1) * LAYERS]):
                assert inputs.layer == layer and inputs.total_heads == HEADS
                assert inputs.canvas.block == (start, start + BLOCK)
                assert inputs.canvas.prompt_length == len(prompt)
                assert inputs.canvas.token_ids[: len(prompt)].tolist() == prompt
                assert inputs.candidates == ((0, start), (start + BLOCK, total))
                rows = total if not late else BLOCK
                assert inputs.first_query == (0 if not late else start)
                assert inputs.queries.shape == (rows, HEADS, 32)
                assert inputs.block_queries.shape == (BLOCK, HEADS, 32)
                assert sum(hi - lo for lo, hi in inputs.rows) == len(others)
    # Each step commits a token, and the saliency is asked in step delay_steps + late.
    assert set(earliest.masks) == {BLOCK - 1 - late}


def test_requests_that_do_not_name_it_are_not_shown(llm: LLM, earliest: Earliest) -> None:
    earliest.seen.clear()
    alone = generate(llm, PROMPTS, [sampling(16)] * 2)
    mixed = generate(
        llm, PROMPTS * 2, [sampling(16)] * 2 + [sampling(16, diffusion_saliency="earliest")] * 2
    )
    assert mixed[:2] == alone
    assert {i.canvas.prompt_length for i in earliest.seen} == set(map(len, PROMPTS))


class Latest(Earliest):
    """The same under another name, registered while the engine runs."""

    name = "latest"


def test_names_are_the_registrys(llm: LLM, earliest: Earliest) -> None:
    asked = [sampling(16, diffusion_saliency="latest")]
    message = "^diffusion_saliency must be one of paper, (.*, )?earliest, got 'latest'"
    with pytest.raises(ValueError, match="'earliest' is registered already"):
        register_saliency(earliest)
    with pytest.raises(ValueError, match=message):
        generate(llm, PROMPTS[:1], asked)
    latest = Latest()
    register_saliency(latest)
    try:
        generate(llm, PROMPTS[:1], asked)
    finally:
        unregister_saliency("latest")
    assert latest.seen
    with pytest.raises(ValueError, match=message):
        generate(llm, PROMPTS[:1], asked)
