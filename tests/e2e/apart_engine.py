# SPDX-License-Identifier: Apache-2.0
"""Program: an engine on a simulated device with its own memory (`tests.e2e.pretended.apart`).

``TRITON_INTERPRET=1 python -m tests.e2e.apart_engine FOLDER BACKEND`` runs requests on random
checkpoints and compares their tokens with the reference's. With ``triton``, block steps take the
path of captured ones. With ``portable``, requests of all kinds run, and the program prints the
copies between host and device and the operators that waited for the device.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from vllm import LLM
from vllm.model_executor.layers import utils

from tests.e2e import interpreted
from tests.e2e.cases import (
    Case,
    beyond_cases,
    constrained_cases,
    drawn_cases,
    greedy_cases,
    plain_cases,
    saliency_cases,
)
from tests.e2e.pretended.apart import CUDA, Apart, Captured, apart, move
from tests.engines import generate, pool_is_whole, running_engine
from tests.interpreter import patch_language_once
from tests.reference import load, write_checkpoint
from tests.reference.checkpoints import special_ids
from vllm_sparse_dllm.engine import runner as runner_module
from vllm_sparse_dllm.engine.cpu_worker import DiffusionCPUWorker

PAGE, BLOCK, CONTEXT = 16, 8, 200


class ApartWorker(DiffusionCPUWorker):
    """Loads the model on the host, where vLLM would use the device, and then moves it there."""

    def init_device(self) -> None:
        super().init_device()
        self.device = CUDA
        self.model_runner = self._make_model_runner()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        # Plain products, as vLLM has on a GPU, instead of weights packed for the CPU.
        utils.dispatch_cpu_unquantized_gemm = _plain_products
        super().load_model(*args, **kwargs)
        move(self.model_runner.model)


def _plain_products(layer: Any, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


def cases_for(model: str, backend: str) -> tuple[list[Case], int]:
    """Return the cases of a model, and the size of its vocabulary."""
    if backend == "triton":
        return interpreted.CASES[::2], interpreted.VOCAB
    vocab, guided = 320, model == "llada"
    mask = special_ids(vocab)["mask"]
    every = (
        greedy_cases(3, vocab),
        drawn_cases(3, vocab, guided),
        beyond_cases(3, vocab, guided),
        saliency_cases(3, vocab, guided),
        constrained_cases(3, vocab, mask, guided),
    )
    rng = random.Random(3)
    cases: list[Case] = []
    for kind in every:
        short = [c for c in kind if len(c.prompt) + c.max_tokens <= CONTEXT and c.max_tokens <= 24]
        cases += rng.sample(short, 2)
    rng.shuffle(cases)
    return cases, vocab


def ask(llm: LLM, cases: list[Case]) -> list[list[int]]:
    """Return the responses; some requests also ask for log-probabilities or a trace."""
    params = [case.sampling() for case in cases]
    for number, own in enumerate(params):
        if number % 4 == 0:
            own.logprobs = 3
        if number % 5 == 0:
            own.extra_args = {**(own.extra_args or {}), "diffusion_trace": 2}
    return generate(llm, [case.prompt for case in cases], params)


def kinds(noted: list[str]) -> dict[str, int]:
    """Count the notes of each kind."""
    return dict(Counter(note.split(", (")[0].split("(")[0] for note in noted))


def main(folder: Path, backend: str) -> int:
    patch_language_once()
    # Few logits at a time, so that rows are split, and profiling in the interpreter takes seconds.
    runner_module._MAX_LOGITS = 1 << 13
    different = asked = 0
    for model, sizes in interpreted.CHECKPOINTS.items():
        cases, vocab = cases_for(model, backend)
        path = write_checkpoint(folder / model, model, vocab=vocab, seed=7, **sizes)
        with (
            apart() as device,
            running_engine(
                str(path),
                block_size=PAGE,
                max_model_len=CONTEXT,
                max_num_batched_tokens=2 * CONTEXT,
                worker_cls="tests.e2e.apart_engine.ApartWorker",
                additional_config={
                    "sparse_dllm": {"attention_backend": backend, "block_length": BLOCK}
                },
            ) as llm,
        ):
            runner: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            print(model, type(runner.backend).__name__, runner.greedy.__name__, runner.device)
            runner.profile_run()
            captured = Captured()
            if backend == "triton":
                runner.capture_graphs(captured, [1, 2, 4])
            outputs = ask(llm, cases)
            if backend == "portable":
                print(model, plain_steps(llm, device))
            assert pool_is_whole(llm)
        if captured.num_replayed:
            print(f"{model} replayed")
        reference = load(path)
        for case, output in zip(cases, outputs, strict=True):
            asked += 1
            if output != case.expected(reference, PAGE):
                different += 1
                print("different:", model, case)
    print(f"{asked} requests, {different} different")
    return different


def plain_steps(llm: LLM, device: Apart) -> str:
    """Run greedy requests of all policies; return the number of steps, and what was copied."""
    cases = plain_cases(BLOCK)
    params = [case.sampling() for case in cases]
    # Not counted: a step larger than any before it may need more than one copy.
    generate(llm, [case.prompt for case in cases], params)
    device.noted.clear()
    runner: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    run_step, steps = runner.run_step, []

    def counted(*args: Any) -> Any:
        commits = run_step(*args)
        steps.append(commits is not None)
        return commits

    runner.run_step = counted
    generate(llm, [case.prompt for case in cases], params)
    return f"{len(steps)} steps, {sum(steps)} with commits: {kinds(device.noted)}"


if __name__ == "__main__":
    # Imported under its own name, so that the worker's class exists only once.
    from tests.e2e import apart_engine

    sys.exit(apart_engine.main(Path(sys.argv[1]), sys.argv[2]))
