# SPDX-License-Identifier: Apache-2.0
"""The trace of a response: which pass committed each token, and with what confidence.

The runner records it (`CommitTrace`), the engine's outputs carry it in parts, with the tokens
they belong to, and the front end merges the parts (`merge`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Name of the trace in the engine's outputs, on `CompletionOutput` and in an answer's choices.
TRACE = "diffusion_trace"

Span = tuple[int, int]


class CommitTrace:
    """The runner's record of a request that asks for a trace.

    Positions of the response that were given, not committed, have step -1 and confidence 1.

    Args:
        response_length: Tokens of the response.
        with_kept: Whether to record which positions each layer kept.

    Attributes:
        num_passes: Forward passes that were run.
    """

    def __init__(self, response_length: int, with_kept: bool) -> None:
        self.num_passes = 0
        self.with_kept = with_kept
        self._num_taken = 0
        self._steps = np.full(response_length, -1, dtype=np.int64)
        self._confidences = np.ones(response_length)
        self._refreshes: list[tuple[int, str, Span, list[np.ndarray]]] = []

    def record_cache(self, kind: str, block: Span, kept: list[np.ndarray]) -> None:
        """Record which positions each layer keeps after the pass that is recorded next.

        Args:
            kind: What changes the cache: ``refresh``, ``evict`` or ``append``.
            block: Positions [start, end) of the current block.
            kept: ``[n]`` positions of each layer, ascending.
        """
        self._refreshes.append((self.num_passes, kind, block, kept))

    def record_pass(self, offsets: np.ndarray, confidences: np.ndarray) -> None:
        """Record what a pass committed.

        Args:
            offsets: ``[n]`` offsets of the tokens in the response.
            confidences: ``[n]`` confidences of the tokens.
        """
        self._steps[offsets] = self.num_passes
        self._confidences[offsets] = confidences
        self.num_passes += 1

    def take(self, num_tokens: int) -> dict[str, Any]:
        """Return the part of the trace that goes with the next tokens of the response."""
        start, end = self._num_taken, self._num_taken + num_tokens
        self._num_taken = end
        part: dict[str, Any] = {
            "steps": self._steps[start:end].tolist(),
            "confidences": self._confidences[start:end].tolist(),
        }
        if self.with_kept:
            part["refreshes"] = [
                {
                    "step": step,
                    "kind": kind,
                    "block": list(block),
                    "kept": [own.tolist() for own in kept],
                }
                for step, kind, block, kept in self._refreshes
            ]
            self._refreshes = []
        return part


def merge(trace: dict[str, Any], part: dict[str, Any]) -> None:
    """Append the part that came with the next tokens to the trace, in place."""
    trace.setdefault("steps", []).extend(part["steps"])
    trace.setdefault("confidences", []).extend(part["confidences"])
    if "refreshes" in part:
        trace.setdefault("refreshes", []).extend(part["refreshes"])


def finish(trace: dict[str, Any], num_tokens: int) -> None:
    """Drop what follows the end of the response and add the number of passes, in place.

    The engine may run on for an arbitrary number of steps until the front end finds a stop string.
    """
    del trace["steps"][num_tokens:]
    del trace["confidences"][num_tokens:]
    trace["nfe"] = max(trace["steps"], default=-1) + 1
    if "refreshes" in trace:
        trace["refreshes"] = [r for r in trace["refreshes"] if r["step"] < trace["nfe"]]
