# SPDX-License-Identifier: Apache-2.0
"""Program: an engine whose attention and confidences are Triton kernels, in the interpreter.

``TRITON_INTERPRET=1 python -m tests.e2e.interpreted FOLDER`` runs a few requests on random
checkpoints and compares their tokens with the reference's: first some of them in eager steps, then
all of them with block steps replayed (`tests.e2e.recorded`).
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.e2e import recorded
from tests.e2e.cases import Case
from tests.engines import generate, running_engine
from tests.interpreter import patch_language_once
from tests.reference import load, write_checkpoint
from vllm_sparse_dllm.engine import graphs
from vllm_sparse_dllm.transfer import HostArrays

VOCAB = 96
PROMPT = [(7 * i) % 80 for i in range(45)]
PAGE = 16

CASES = [
    Case(PROMPT, 8, {"cache_policy": "none", "block_length": 4, "steps": 4}),
    Case(PROMPT[:20], 12, {"cache_policy": "prefix", "block_length": 4, "steps": 6}),
    Case(PROMPT[:33], 8, {"cache_policy": "dual", "block_length": 8, "remasking": "topk_margin"}),
    Case(PROMPT, 12, {"block_length": 6, "keep_ratio": 0.5, "remasking": "entropy"}),
    Case(PROMPT[2:], 8, {"block_length": 8, "saliency": "attention", "keep_ratio": 0.4}),
    Case(PROMPT[3:], 8, {"block_length": 8, "granularity": "page", "keep_ratio": 0.4}),
    Case(PROMPT[1:], 8, {"block_length": 8, "delay_steps": 0, "eviction_delay": 1}),
    Case(PROMPT[:9], 12, {"block_length": 4, "refresh_interval": 2, "threshold": 0.05}),
    Case(PROMPT[:15], 8, {"block_length": 8, "temperature": 0.8, "steps": 4}, seed=5),
]

EAGER = CASES[2::3]

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llada": {"d_model": 32, "layers": 2, "heads": 2, "mlp": 48},
    "dream": {"d_model": 96, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 48},
}


def capture(runner: Any, replayed: set[int]) -> None:
    """Replay block steps of up to four sequences; add the sizes of the graphs to ``replayed``."""
    # Make the host act as a device that arrays must be copied to.
    graphs.HostArrays = partial(HostArrays, staged=True)  # type: ignore[misc, assignment]
    runner.arrays = HostArrays(runner.device, staged=True)
    runner.capture_graphs(recorded.capture, [1, 2, 4])
    for size, graph in zip(runner.graphs.sizes, runner.graphs._graphs, strict=True):
        replay = graph._replay
        graph._replay = lambda size=size, replay=replay: (replayed.add(size), replay())


def main(folder: Path) -> int:
    patch_language_once()
    different = 0
    for model, sizes in CHECKPOINTS.items():
        path = write_checkpoint(folder / model, model, vocab=VOCAB, seed=7, **sizes)
        settings = {"attention_backend": "triton", "block_length": 8}
        replayed: set[int] = set()
        with running_engine(
            str(path), block_size=PAGE, additional_config={"sparse_dllm": settings}
        ) as llm:
            runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            print(model, type(runner.backend).__name__, runner.greedy.__name__)
            eager = generate(llm, [c.prompt for c in EAGER], [c.sampling() for c in EAGER])
            capture(runner, replayed)
            outputs = generate(llm, [c.prompt for c in CASES], [c.sampling() for c in CASES])
            # Equal requests run in step, so that no other kind of step prevents a replay.
            for num in (1, 2, 3):
                own = [CASES[2]] * num
                again = generate(llm, [c.prompt for c in own], [c.sampling() for c in own])
                different += again != [outputs[2]] * num
            sizes = ", ".join(map(str, sorted(replayed)))
            print(f"{model} replayed graphs of {sizes} sequences")
        reference = load(path)
        for case, output in zip([*EAGER, *CASES], [*eager, *outputs], strict=True):
            if output != case.expected(reference, PAGE):
                different += 1
                print("different:", model, case)
    print(f"{(len(EAGER) + len(CASES)) * len(CHECKPOINTS)} requests, {different} different")
    return different


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
