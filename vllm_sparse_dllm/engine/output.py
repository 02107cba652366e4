# SPDX-License-Identifier: Apache-2.0
"""What the runner tells the scheduler beyond vLLM's own output."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class DiffusionRunnerOutput(ModelRunnerOutput):
    """vLLM's output and where each request stands.

    Attributes:
        progress: For each request that ran: block and step within it that come next.
        failed: Requests that cannot go on, with the reason.
    """

    progress: dict[str, tuple[int, int]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
