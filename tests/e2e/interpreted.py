# SPDX-License-Identifier: Apache-2.0
"""An engine whose attention and confidences are Triton kernels in the interpreter, as a program.

``TRITON_INTERPRET=1 python -m tests.e2e.interpreted FOLDER`` runs a few requests on random
checkpoints and compares their tokens with the reference's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tests.e2e.cases import Case
from tests.engines import generate, running_engine
from tests.reference import load, write_checkpoint

VOCAB = 96
PROMPT = [(7 * i) % 80 for i in range(45)]
PAGE = 16

CASES = [
    Case(PROMPT, 8, {"cache_policy": "none", "block_length": 4, "steps": 4}),
    Case(PROMPT[:20], 12, {"cache_policy": "prefix", "block_length": 4, "steps": 6}),
    Case(PROMPT[:33], 8, {"cache_policy": "dual", "block_length": 8, "remasking": "topk_margin"}),
    Case(PROMPT, 12, {"block_length": 6, "keep_ratio": 0.5, "remasking": "entropy"}),
    Case(PROMPT[3:], 8, {"block_length": 8, "granularity": "page", "keep_ratio": 0.4}),
    Case(PROMPT[1:], 8, {"block_length": 8, "delay_steps": 0, "eviction_delay": 1}),
    Case(PROMPT[:9], 12, {"block_length": 4, "refresh_interval": 2, "threshold": 0.05}),
    Case(PROMPT[:15], 8, {"block_length": 8, "temperature": 0.8, "steps": 4}, seed=5),
]

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llada": {"d_model": 32, "layers": 2, "heads": 2, "mlp": 48},
    "dream": {"d_model": 96, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 48},
}


def main(folder: Path) -> int:
    different = 0
    for model, sizes in CHECKPOINTS.items():
        path = write_checkpoint(folder / model, model, vocab=VOCAB, seed=7, **sizes)
        settings = {"attention_backend": "triton"}
        with running_engine(
            str(path), block_size=PAGE, additional_config={"sparse_dllm": settings}
        ) as llm:
            runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            print(model, type(runner.backend).__name__, runner._greedy.__name__)
            outputs = generate(llm, [c.prompt for c in CASES], [c.sampling() for c in CASES])
        reference = load(path)
        for case, output in zip(CASES, outputs, strict=True):
            if output != case.expected(reference, PAGE):
                different += 1
                print("different:", model, case)
    print(f"{len(CASES) * len(CHECKPOINTS)} requests, {different} different")
    return different


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
