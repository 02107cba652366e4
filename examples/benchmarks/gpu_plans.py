# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark measures in turn, on which engines, and in how much memory."""

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

#: Memory of the card that each program has for what is no weight, page or activation: the CUDA
#: context, libraries' work spaces, graphs, logits.
_RESERVE = 4 * GIB
#: Tokens of the largest step that vLLM's defaults ask for where contexts are shorter.
_LARGEST_STEP = 16384


@dataclass(frozen=True)
class Turn:
    """What is measured in turn on the same requests.

    Attributes:
        sweep: What for.
        prompt: Tokens of each prompt.
        requests: At once.
        contenders: In order.
    """

    sweep: str
    prompt: int
    requests: int
    contenders: list[Contender]

    def without(self, lost: Collection[Contender]) -> Turn:
        """Return the turn without contenders."""
        left = [one for one in self.contenders if one not in lost]
        return replace(self, contenders=left)

    @property
    def what(self) -> str:
        return f"{self.sweep}: context {self.prompt:,}, {self.requests} at once"


@dataclass(frozen=True)
class Plan:
    """Groups that are measured on the same programs.

    Attributes:
        groups: Their names.
        turns: In order.
        least: Pages without which vLLM does not start: of the longest request.
        needed: Pages that all turns' requests find room in.
        pages: Pages that those find room in which fit at all.
        most: Pages that there is room for beside the programs' weights.
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
        """Those of all turns, each once."""
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
    """A turn of which at least a round is begun.

    Attributes:
        turn: What is measured.
        workload: What was measured.
        entry: What the record has of it, where that is not the measurements themselves.
    """

    turn: Turn
    workload: Workload
    entry: Job


@dataclass(frozen=True)
class Failure:
    """What ended a contender the first time, and with which requests."""

    prompt: int
    requests: int
    why: str


class Planner:
    """Makes plans of the groups that are asked for.

    Args:
        arguments: The command line.
        scale: How large everything is.
        session: Not started; has the model and the options.
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
        """Return the rows of the passes that are to be measured, as far as rates depend on them."""
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
        """Return as few plans as there is memory for: an engine takes a while to start.

        Args:
            memory: Bytes that the device has; None for as much as is needed.
        """
        chosen = self.arguments.groups
        together = [group for group in chosen if group != "memory"]
        parts = [together]
        if together and not self._plan(together, memory).fits:
            parts = [[group for group in together if group != "baseline"], ["baseline"]]
        # The pool is to hold one request and no more.
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
        # What does not fit gets no room: steps and other programs need what is left of the card.
        pages = max((one for one in each if one <= most), default=least)
        return Plan(groups, turns, least, max(each, default=least), pages, most)

    def _most_pages(self, memory: int | None, longest: int, baseline_rows: int) -> float:
        """Return the pages that there is room for.

        Args:
            memory: Bytes that the device has; None for as much as is needed.
            longest: Positions of the longest request, which a step runs together.
            baseline_rows: Positions of the baseline's longest canvas, 0 if it does not run.
        """
        if self.arguments.kv_cache_gib is not None:
            room = self.arguments.kv_cache_gib * GIB
        elif memory is None:
            return math.inf
        else:
            shape = self.session.shape
            program = (shape.weights + shape.width * shape.vocab) * self.element_bytes + _RESERVE
            # A layer's activations, some of them in float32.
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
