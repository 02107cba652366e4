# SPDX-License-Identifier: Apache-2.0
"""Messages between scheduler and runner that extend vLLM's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_sparse_dllm.cache.policies import Progress
from vllm_sparse_dllm.engine.figures import StepCounts


@dataclass
class DiffusionSchedulerOutput(SchedulerOutput):
    """vLLM's message, and how many steps the runner may take by itself.

    Attributes:
        max_steps: Most denoising steps to run. The runner stops earlier at the end of a block or
            of a response, and wherever else the scheduler has to decide.
        constrained: The scheduled requests that a grammar constrains. If there are any, the
            masks of their next tokens follow while the network runs (`GrammarOutput`), and the
            runner chooses tokens only then.
    """

    max_steps: int = 1
    constrained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a request cannot go on.

    Attributes:
        cause: One of `FAILURE_CAUSES`.
        reason: In words. With a cause in `TOLD_CAUSES`, the client gets it; it then begins with
            the name of the field at fault.
    """

    cause: str
    reason: str


@dataclass
class DiffusionRunnerOutput(ModelRunnerOutput):
    """vLLM's output, and the progress of each request.

    Attributes:
        progress: The progress of each request that ran, after these steps.
        num_steps: Denoising steps that were run.
        failed: Requests that cannot go on.
        counts: What was run.
        traces: For each traced request with new final tokens: the part of the trace that
            belongs to them (`CommitTrace.take`).
    """

    progress: dict[str, Progress] = field(default_factory=dict)
    num_steps: int = 1
    failed: dict[str, Failure] = field(default_factory=dict)
    counts: StepCounts = field(default_factory=StepCounts)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
