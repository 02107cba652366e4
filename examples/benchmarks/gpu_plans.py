# SPDX-License-Identifier: Apache-2.0
"""Plans of the GPU benchmark: what is measured, on which engines, and in how much memory."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import gpu_cases as cases
from bounds import MANY_ROWS, passes_of_response
from gpu_cases import GIB, Scale
from programs import Job
from session import Contender, Session, Workload

#: GPU memory reserved per program for all but weights, pages and activations: the CUDA context,
#: libraries' workspaces, graphs, logits.
_RESERVE = 4 * GIB
#: Tokens of the largest step by vLLM's defaults, if contexts are shorter.
_LARGEST_STEP = 16384


@dataclass(frozen=True)
class Turn:
    """Contenders that are measured alternately on the same requests.

    Attributes:
        sweep: Name of the sweep that they are measured for.
        prompt: Tokens of each prompt.
        requests: Requests at once.
        contenders: The contenders, in order.
    """

    sweep: str
    prompt: int
    requests: int
    contenders: list[Contender]

    def without(self, lost: Collection[Contender]) -> Turn:
        """Return the turn without the ``lost`` contenders."""
        left = [one for one in self.contenders if one not in lost]
        return replace(self, contenders=left)

    @property
    def what(self) -> str:
        return f"{self.sweep}: context {self.prompt:,}, {self.requests} at once"


@dataclass(frozen=True)
class Plan:
    """Groups that are measured on the same programs.

    Attributes:
        groups: Names of the groups.
        turns: Their turns, in order.
        least: Pages of the longest request, without which vLLM does not start.
        needed: Pages that the requests of every turn fit into.
        pages: Pages of the pool: enough for every contender that fits on the device.
        most: Pages that the device has room for besides weights and activations.
    """

    groups: list[str]
    turns: list[Turn]
    least: int
    needed: int
    pages: int
    most: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.most

    @property
    def name(self) -> str:
        return ", ".join(self.groups)

    @property
    def contenders(self) -> list[Contender]:
        """The contenders of all turns, without repeats."""
        found = {one.name: one for turn in self.turns for one in turn.contenders}
        return list(found.values())

    @property
    def programs(self) -> list[str]:
        return sorted({one.program for one in self.contenders})

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(turn.prompt for turn in self.turns)


@dataclass
class Running:
    """A turn of which at least one round has begun.

    Attributes:
        turn: The turn.
        workload: Its jobs, and its results so far.
        entry: Its entry in the record's steps or memory; empty for other sweeps.
    """

    turn: Turn
    workload: Workload
    entry: Job


@dataclass(frozen=True)
class Failure:
    """A contender's first failure: its requests, and the reason."""

    prompt: int
    requests: int
    why: str


class Planner:
    """Makes plans for the requested groups.

    Args:
        arguments: The command line.
        scale: Sizes of the workloads.
        session: A session that is not started, for its model and options.
        page_size: Slots of a page.
        element_bytes: Bytes of a weight.
    """

    def __init__(
        self,
        arguments: Namespace,
        scale: Scale,
        session: Session,
        page_size: int,
        element_bytes: int,
    ) -> None:
        self.arguments = arguments
        self.scale = scale
        self.session = session
        self.page_size = page_size
        self.element_bytes = element_bytes

    @property
    def page_bytes(self) -> int:
        return cases.page_bytes(self.session.shape, self.page_size, self.element_bytes)

    def rows(self) -> list[int]:
        """Return the numbers of rows, of all planned passes, at which to measure the rates."""
        response = self.scale.response
        found = {
            turn.requests * passes.rows
            for group in self.arguments.groups
            for turn in self._turns(group)
            for one in turn.contenders
            for passes in passes_of_response(one.settings, turn.prompt, response)
        }
        most = max(self._contexts_asked_for) + response
        return sorted({*(rows for rows in found if rows < MANY_ROWS), MANY_ROWS, most})

    def plans(self, memory: int | None) -> list[Plan]:
        """Return as few plans as memory allows, since an engine takes a while to start.

        Args:
            memory: Bytes of the device's memory; None if it does not limit the plans.
        """
        chosen = self.arguments.groups
        together = [group for group in chosen if group != "memory"]
        parts = [together]
        if together and not self._plan(together, memory).fits:
            parts = [[group for group in together if group != "baseline"], ["baseline"]]
        # For the group "memory", the pool must hold one request and no more.
        parts.append(["memory"])
        asked = ([group for group in part if group in chosen] for part in parts)
        return [self._plan(part, memory) for part in asked if part]

    def _plan(self, groups: list[str], memory: int | None) -> Plan:
        turns = [turn for group in groups for turn in self._turns(group)]
        response = self.scale.response
        longest = max(turn.prompt for turn in turns) + response
        held = [
            (one.settings, turn.prompt, turn.requests)
            for turn in turns
            for one in turn.contenders
            if one.program == "engine"
        ]
        least, *each = (
            cases.pool_pages(some, response, longest, self.page_size)
            for some in ([], *([one] for one in held))
        )
        rows = max((turn.prompt for turn in turns if turn.sweep == "baseline"), default=0)
        most = self._most_pages(memory, longest, rows and rows + response)
        # The pool is not enlarged for contenders that do not fit: the rest of the device's memory
        # is needed for steps and other programs.
        pages = max((one for one in each if one <= most), default=least)
        return Plan(groups, turns, least, max(each, default=least), pages, most)

    def _most_pages(self, memory: int | None, longest: int, baseline_rows: int) -> float:
        """Return the number of pages that there is room for.

        Args:
            memory: Bytes of the device's memory; None if it does not limit the pages.
            longest: Positions of the longest request, all of which run in one step.
            baseline_rows: Positions of the baseline's longest request; 0 if it does not run.
        """
        if self.arguments.kv_cache_gib is not None:
            room = self.arguments.kv_cache_gib * GIB
        elif memory is None:
            return math.inf
        else:
            shape = self.session.shape
            program = (shape.weights + shape.width * shape.vocab) * self.element_bytes + _RESERVE
            # Bytes per row of a layer's activations, some of which are in float32.
            activations = 4 * (4 * shape.mlp + 8 * shape.width)
            steps = activations * (max(longest, _LARGEST_STEP) + baseline_rows)
            # The baseline's dual cache takes the softmax of all rows' logits in float64.
            logits = 3 * 8 * shape.vocab * baseline_rows
            room = memory - program * (2 if baseline_rows else 1) - steps - logits
        return max(0, room // self.page_bytes)

    # Turns.

    @property
    def _contexts_asked_for(self) -> Sequence[int]:
        return self.arguments.contexts or self.scale.contexts

    def _turns(self, group: str) -> list[Turn]:
        turns: list[Turn] = getattr(self, f"_{group}")()
        return turns

    def _contexts(self) -> list[Turn]:
        return [Turn("contexts", n, 1, self._contenders()) for n in self._contexts_asked_for]

    def _batches(self) -> list[Turn]:
        return [
            Turn(f"{requests} at once", context, requests, self._contenders())
            for requests in self.arguments.batches or self.scale.batches
            if requests > 1
            for context in self._contexts_asked_for
        ]

    def _long(self) -> list[Turn]:
        return [Turn("long", self.scale.long, 1, [cases.engine(self.session, "sparse")])]

    def _steps(self) -> list[Turn]:
        scale = self.scale
        return [
            Turn("steps", context, requests, cases.steps_contenders(self.session))
            for context, requests in ((scale.short, 1), (scale.large, 1), (scale.short, scale.many))
        ]

    def _baseline(self) -> list[Turn]:
        contenders = [cases.engine(self.session, "sparse")]
        contenders += [cases.baseline(self.session, name) for name in cases.BASELINES]
        return [Turn("baseline", context, 1, contenders) for context in self._contexts_asked_for]

    def _memory(self) -> list[Turn]:
        return [Turn("memory", self.scale.large, 1, [cases.engine(self.session, "sparse")])]

    def _contenders(self) -> list[Contender]:
        return [cases.engine(self.session, name) for name in self.arguments.contenders]
