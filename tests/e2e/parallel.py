# SPDX-License-Identifier: Apache-2.0
"""Program: tensor-parallel engines that run the cases of each layout on several ranks.

``python -m tests.e2e.parallel BACKEND FOLDER`` runs the layouts of an executor backend, one
engine after the other, and writes ``FOLDER/BACKEND.json`` with a `Result` for each. It is a
program because vLLM chooses its platform once per process, and Ray needs a different one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.e2e.cases import (
    Case,
    beyond_cases,
    constrained_cases,
    drawn_cases,
    greedy_cases,
    saliency_cases,
)
from tests.e2e.server import tiny_llada
from tests.engines import CACHE_BYTES, generate, running_engine
from tests.reference import write_checkpoint
from tests.reference.checkpoints import special_ids

#: The tokenizer is the embedded model's; the vocabulary is divisible by 2 and by 3.
VOCAB, EOS = 1536, 1
MASK = special_ids(VOCAB)["mask"]
#: The grammar of each layout's last request, and the length of its response.
EXPRESSION, EXPRESSION_TOKENS = r"name[0-9]{2} (yes|no)+", 16
HEAD_SIZE, NUM_LAYERS, PAGE_SIZE = 32, 2, 32


@dataclass(frozen=True)
class Layout:
    """A model on several ranks.

    Attributes:
        model: ``llada`` or ``dream``.
        heads: Query heads.
        kv_heads: Key/value heads.
        ranks: Tensor-parallel ranks.
        backend: vLLM's executor backend.
        seed: Seed of the cases.
        every: Run only one in so many cases, except those that every layout runs: ranks that share
            a core wait for each other.
    """

    model: str
    heads: int
    kv_heads: int
    ranks: int
    backend: str
    seed: int
    every: int = 1

    @property
    def cases(self) -> list[Case]:
        guided = self.model == "llada"
        cases = (
            greedy_cases(self.seed, VOCAB)[self.seed % 5 :: 5]
            + drawn_cases(self.seed, VOCAB, guided)[self.seed % 7 :: 7]
            + beyond_cases(self.seed, VOCAB, guided)[self.seed % 7 :: 7]
        )
        # Every layout runs these, which are of all kinds.
        return (
            cases[:: self.every]
            + saliency_cases(self.seed, VOCAB, guided)[self.seed % 5 :: 5]
            + constrained_cases(self.seed, VOCAB, MASK, guided)[self.seed % 9 :: 9]
        )

    def write(self, folder: Path) -> Path:
        """Write the layout's checkpoint."""
        return write_checkpoint(
            folder / f"{self.model}-{self.heads}-{self.kv_heads}",
            self.model,
            d_model=HEAD_SIZE * self.heads,
            layers=NUM_LAYERS,
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp=192,
            vocab=VOCAB,
            seed=7,
        )


LAYOUTS = {
    "mp-llada-split": Layout("llada", 4, 4, 2, "mp", 1),
    # With three ranks, an all-reduce may add in another order on each.
    "mp-dream-replicated": Layout("dream", 3, 1, 3, "mp", 2, every=3),
    "ray-dream-split": Layout("dream", 4, 2, 2, "ray", 4),
}
if os.environ.get("ALL_LAYOUTS"):
    # The remaining combinations of executor, model, and heads split or replicated. Each engine
    # takes half a minute on two cores, most of it the start.
    LAYOUTS |= {
        "mp-llada-replicated": Layout("llada", 4, 1, 2, "mp", 5, every=4),
        "mp-dream-split": Layout("dream", 4, 4, 2, "mp", 8, every=4),
        "ray-llada-split": Layout("llada", 4, 2, 2, "ray", 6, every=4),
        "ray-llada-replicated": Layout("llada", 4, 1, 2, "ray", 3),
        "ray-dream-replicated": Layout("dream", 4, 1, 2, "ray", 14, every=4),
    }


@dataclass(frozen=True)
class Result:
    """What the engine of a layout did.

    Attributes:
        outputs: The response ids of each case, then those of the request with a grammar.
        choices: For each rank, a digest of all positions that its caches kept, layer by layer.
        num_choices: For each rank, how often it chose the positions that a layer keeps.
        cores: For each rank, the cores it is allowed to run on.
        num_pages: Pages of the pool, including the one that vLLM reserves.
    """

    outputs: list[list[int]]
    choices: list[str]
    num_choices: list[int]
    cores: list[list[int]]
    num_pages: int


# The next two functions run on the ranks.


def _record_choices(worker: Any) -> None:
    from vllm_sparse_dllm.attention import module

    original, recorder = module.select_entries, module
    recorder.digest, recorder.num_choices = hashlib.sha256(), 0  # type: ignore[attr-defined]

    def select_entries(*args: Any) -> Any:
        kept = original(*args)
        recorder.digest.update(kept.numpy().tobytes())  # type: ignore[attr-defined]
        recorder.num_choices += 1  # type: ignore[attr-defined]
        return kept

    recorder.select_entries = select_entries


def _recorded(worker: Any) -> tuple[str, int, list[int]]:
    from vllm_sparse_dllm.attention import module

    digest, number = module.digest, module.num_choices  # type: ignore[attr-defined]
    return digest.hexdigest(), number, sorted(os.sched_getaffinity(0))


def _grammar_sampling() -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=EXPRESSION_TOKENS,
        structured_outputs=StructuredOutputsParams(regex=EXPRESSION),
    )


def _run(layout: Layout, folder: Path) -> Result:
    options = {
        "tensor_parallel_size": layout.ranks,
        "distributed_executor_backend": layout.backend,
        "tokenizer": str(tiny_llada()),
        "skip_tokenizer_init": False,
    }
    cases = layout.cases
    with running_engine(str(layout.write(folder)), **options) as llm:
        _on_ranks(llm, _record_choices)
        outputs = generate(
            llm,
            [*(case.prompt for case in cases), cases[0].prompt],
            [*(case.sampling() for case in cases), _grammar_sampling()],
        )
        choices, numbers, cores = zip(*_on_ranks(llm, _recorded), strict=True)
        config = llm.llm_engine.vllm_config
        num_pages = config.cache_config.num_gpu_blocks
    assert num_pages is not None
    if config.parallel_config.placement_group is not None:
        from ray.util import remove_placement_group

        # vLLM keeps the group until the process ends; the next engine would wait for its resources.
        remove_placement_group(config.parallel_config.placement_group)
    return Result(outputs, list(choices), list(numbers), list(cores), num_pages)


def _on_ranks(llm: LLM, function: Any) -> list[Any]:
    return llm.llm_engine.model_executor.collective_rpc(function)


def expected_pages(layout: Layout) -> int:
    """Return how many pages fit into the memory of a rank, which stores only its own heads."""
    kv_heads = max(1, layout.kv_heads // layout.ranks)
    return CACHE_BYTES // (NUM_LAYERS * 2 * PAGE_SIZE * kv_heads * HEAD_SIZE * 4)


@contextmanager
def _local_ray() -> Iterator[None]:
    """Run Ray with resources for two workers."""
    import ray

    # Paths of sockets must be short, and clusters must not share files.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def main(backend: str, folder: Path) -> None:
    """Run the layouts of a backend."""
    with _local_ray() if backend == "ray" else nullcontext():
        results = {
            name: dataclasses.asdict(_run(layout, folder))
            for name, layout in LAYOUTS.items()
            if layout.backend == backend
        }
    (folder / f"{backend}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
