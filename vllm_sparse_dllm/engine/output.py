# SPDX-License-Identifier: Apache-2.0
"""What scheduler and runner tell each other beyond vLLM's own messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_sparse_dllm.cache.policies import Progress
from vllm_sparse_dllm.engine.figures import StepCounts


@dataclass
class DiffusionSchedulerOutput(SchedulerOutput):
    """vLLM's message and how far the runner may go on by itself.

    Attributes:
        max_steps: Denoising steps to run at the most. The runner stops earlier at the end of
            a block, of a response, or at anything else that is the scheduler's to decide.
        allowed_tokens: For each scheduled request that a grammar constrains: the bit mask of
            its next token, as in `AllowedTokens`.
    """

    max_steps: int = 1
    allowed_tokens: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a request cannot go on.

    Attributes:
        cause: One of `FAILURE_CAUSES`.
        reason: In words. Those of `TOLD_CAUSES` are told to whoever sent it.
    """

    cause: str
    reason: str


@dataclass
class DiffusionRunnerOutput(ModelRunnerOutput):
    """vLLM's output and where each request stands.

    Attributes:
        progress: For each request that ran: where it stands now.
        num_steps: Denoising steps that were run.
        failed: Requests that cannot go on.
        counts: What was run.
        traces: For each request that asked for it and has new final tokens: how they came
            about (`CommitTrace.take`).
    """

    progress: dict[str, Progress] = field(default_factory=dict)
    num_steps: int = 1
    failed: dict[str, Failure] = field(default_factory=dict)
    counts: StepCounts = field(default_factory=StepCounts)
    traces: dict[str, dict[str, Any]] = field(default_factory=dict)
