# SPDX-License-Identifier: Apache-2.0
"""An estimate of throughput on several devices: what a step must compute, move and exchange.

All requests are alike (prompts of one length, responses in blocks), and the state is steady: a
replica always has the same number of requests at hand. A pass of r rows through a layer takes its
roofline (the larger of operations over rate and bytes over bandwidth), divided by the
tensor-parallel ranks. The host's work is not divided and overlaps with the devices', so the longer
of the two counts; exchanges between ranks are added and overlap with nothing. Times are in seconds,
sizes in bytes, rates per second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Model:
    """Sizes of a network; the defaults are LLaDA-8B's in bfloat16."""

    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp: int = 12288
    vocab: int = 126464
    element: int = 2

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    def can_be_divided(self, ranks: int) -> bool:
        """Return whether the engine can run with ``ranks`` tensor-parallel ranks."""
        kv_heads = self.kv_heads % ranks == 0 or ranks % self.kv_heads == 0
        # vLLM pads the vocabulary.
        rows = -(-self.vocab // 64) * 64
        return kv_heads and not (self.heads % ranks or self.mlp % ranks or rows % ranks)

    @property
    def layer_weights(self) -> int:
        """Weights of a layer."""
        return self.width * (2 * self.width + 2 * self.kv_width + 3 * self.mlp)

    @property
    def head_weights(self) -> int:
        return self.width * self.vocab

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, including the embedding's."""
        return self.element * (self.layers * self.layer_weights + 2 * self.head_weights)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a position's keys and values in all layers."""
        return 2 * self.element * self.layers * self.kv_width


@dataclass(frozen=True)
class Link:
    """A connection between devices.

    Attributes:
        bandwidth: Bytes a second that a device sends while it receives as many.
        latency: Seconds that a collective takes regardless of its size.
    """

    bandwidth: float
    latency: float

    @classmethod
    def measured(cls, ranks: int, points: Sequence[tuple[float, float]]) -> Link:
        """Return the link that explains measured times of all-reduces.

        Args:
            ranks: Number of ranks that took part.
            points: Bytes per rank, and seconds; only the smallest and the largest size are used.

        Raises:
            ValueError: If there are fewer than 2 ranks, or a larger size did not take longer.
        """
        (small, first), (large, second) = min(points), max(points)
        if ranks < 2 or not 0 < first < second or not small < large:
            raise ValueError(
                f"all-reduces of 2 or more ranks must be of two sizes, the larger one slower, "
                f"got {ranks} ranks and {points!r}"
            )
        slope = (second - first) / (large - small)
        # Negative where small sizes are faster than in proportion to large ones: taken as 0.
        latency = max(0.0, first - small * slope)
        return cls(bandwidth=2 * (ranks - 1) / ranks / slope, latency=latency)

    def all_reduce(self, size: float, ranks: int) -> float:
        """Return the time to sum ``size`` bytes of each rank, by a ring in two phases."""
        if ranks == 1:
            return 0.0
        return self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth

    def all_gather(self, size: float, ranks: int) -> float:
        """Return the time to gather ``size`` bytes, held in equal parts, on every rank."""
        if ranks == 1:
            return 0.0
        return self.latency + (ranks - 1) / ranks * size / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """Nodes of devices.

    Attributes:
        flops: Operations a second that a device achieves in large matrix products.
        bandwidth: Bytes a second that a device achieves when reading its memory.
        memory: Bytes of a device that are available to weights and pages.
        devices_per_node: Devices that ``inside`` connects.
        inside: Link between the devices of a node.
        between: Link between nodes, per device.
        host_layer: Host seconds per layer of a pass, to launch its kernels.
        host_request: Host seconds per request and layer: attention is a call for each request.
        host_step: Host seconds of a step outside the model.
    """

    flops: float
    bandwidth: float
    memory: float
    devices_per_node: int
    inside: Link
    between: Link
    host_layer: float = 0.0
    host_request: float = 0.0
    host_step: float = 0.0

    def link(self, ranks: int) -> Link:
        """Return the slowest link between ``ranks`` ranks, placed node by node."""
        return self.inside if ranks <= self.devices_per_node else self.between


@dataclass(frozen=True)
class Workload:
    """What every request asks for, and the engine's token budget.

    Attributes:
        prompt: Tokens of the prompt.
        response: Positions of the response, a multiple of ``block``.
        block: Positions of a block.
        steps: Denoising steps of a block, full passes included.
        full_passes: Steps of a block that run all positions; the last of them fills the cache.
        keep: Keep ratio of the keys outside the block; 1 is the policy `dual`.
        tokens_per_pass: Maximum rows of a full pass; more requests are split over several passes.
    """

    prompt: int = 1024
    response: int = 256
    block: int = 32
    steps: int = 32
    full_passes: int = 2
    keep: float = 0.5
    tokens_per_pass: int = 8192

    def __post_init__(self) -> None:
        for name in ("prompt", "response", "block", "steps", "tokens_per_pass"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        if self.response % self.block:
            raise ValueError(f"response must be a multiple of block, got {self.response}")
        if not 0 <= self.full_passes <= self.steps:
            raise ValueError(
                f"full_passes must be from 0 to {self.steps} (steps), got {self.full_passes}"
            )

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def slots(self) -> int:
        """Slots that a request holds."""
        return int((self.length - self.block) * self.keep) + self.block


@dataclass(frozen=True)
class Measured:
    """Measured times of an engine's passes, used in place of the roofline and the host's part.

    Attributes:
        block: Pairs of a block step's rows (of all requests) and its time, by rising rows.
        full: The same for full passes.
    """

    block: tuple[tuple[int, float], ...]
    full: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        for name in ("block", "full"):
            points = getattr(self, name)
            rows = [row for row, _ in points]
            positive = all(number > 0 for point in points for number in point)
            if not points or rows != sorted(set(rows)) or not positive:
                raise ValueError(
                    f"{name} must be pairs of rows and seconds above 0, by rising rows, "
                    f"got {points!r}"
                )

    @staticmethod
    def at(points: tuple[tuple[int, float], ...], rows: float) -> float:
        """Return the time of ``rows`` rows.

        Linear between points, constant below the first one, proportional beyond the last one.
        """
        number = bisect_left([row for row, _ in points], rows)
        if number == 0:
            # Fewer rows than measured cost the same: the weights are read in any case.
            return points[0][1]
        if number == len(points):
            return points[-1][1] * rows / points[-1][0]
        (low, first), (high, second) = points[number - 1], points[number]
        return first + (second - first) * (rows - low) / (high - low)


@dataclass(frozen=True)
class Pass:
    """Times of a pass: the devices' work, exchange between ranks, and the host's work."""

    work: float
    exchange: float
    host: float

    @property
    def seconds(self) -> float:
        # The host runs ahead of the device, so the longer of the two counts.
        return max(self.work, self.host) + self.exchange

    def __mul__(self, times: float) -> Pass:
        return Pass(self.work * times, self.exchange * times, self.host * times)


def model_pass(
    model: Model,
    machine: Machine,
    ranks: int,
    requests: int,
    rows: int,
    keys: int,
    cached: int,
    logits: int,
    chooses: bool,
) -> Pass:
    """Return the time of a pass by the roofline.

    Args:
        model: The network.
        machine: What it runs on.
        ranks: Tensor-parallel ranks.
        requests: Requests in the pass.
        rows: Rows of each.
        keys: Keys that each row attends to.
        cached: Those of them that are read from the cache.
        logits: Rows of each request whose logits are needed.
        chooses: Whether the pass also chooses which keys are kept.
    """
    total = requests * rows
    operations = 2.0 * total * model.layer_weights + 4.0 * total * keys * model.width
    read = model.element * model.layer_weights + requests * cached * model.slot_bytes / model.layers
    head_operations = 2.0 * requests * logits * model.head_weights
    work = model.layers * max(operations / machine.flops, read / machine.bandwidth)
    work += max(
        head_operations / machine.flops, model.element * model.head_weights / machine.bandwidth
    )
    link = machine.link(ranks)
    # All-reduces after attention and after the feed-forward part; one more for the embedding.
    exchange = (2 * model.layers + 1) * link.all_reduce(total * model.width * model.element, ranks)
    exchange += link.all_gather(requests * logits * model.vocab * model.element, ranks)
    if chooses:
        # Each rank contributes its part of the saliency of all keys, once per layer.
        part = requests * keys * model.element
        exchange += model.layers * link.all_gather(ranks * part, ranks)
    host = machine.host_step + model.layers * (machine.host_layer + requests * machine.host_request)
    return Pass(work / ranks, exchange, host)


@dataclass(frozen=True)
class Estimate:
    """The estimated performance of a layout of devices.

    Attributes:
        ranks: Tensor-parallel ranks of a replica.
        replicas: Replicas of the engine.
        requests: Requests that clients have in flight at once.
        running: Requests that the busiest replica has room for and runs at once.
        throughput: Tokens a second of all replicas.
        latency: Seconds from a request's first pass to its last token, on the busiest replica.
        block_step: Seconds of a block step.
        full_pass: Seconds to run one full pass of each running request.
        exchange: Share of a replica's time that is spent on exchange between ranks.
    """

    ranks: int
    replicas: int
    requests: int
    running: int
    throughput: float
    latency: float
    block_step: float
    full_pass: float
    exchange: float

    @property
    def devices(self) -> int:
        return self.ranks * self.replicas


def room(model: Model, machine: Machine, workload: Workload, ranks: int) -> int:
    """Return how many requests fit in a replica's memory, 0 if not even the weights do."""
    # With fewer key/value heads than ranks, keys and values are stored more than once.
    copies = max(1, ranks // model.kv_heads)
    left = ranks * machine.memory - model.weight_bytes
    return max(0, int(left // (workload.slots * model.slot_bytes * copies)))


def estimate(
    model: Model,
    machine: Machine,
    workload: Workload,
    ranks: int,
    replicas: int,
    requests: int,
    measured: Mapping[int, Measured] | None = None,
) -> Estimate:
    """Return the estimate for replicas of ``ranks`` devices each and ``requests`` requests at once.

    ``measured`` is as in `passes`.

    Raises:
        ValueError: If a number is below 1, or the model and a request do not fit.
    """
    for name, number in (("ranks", ranks), ("replicas", replicas), ("requests", requests)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    places = room(model, machine, workload, ranks)
    if not places:
        raise ValueError(f"{ranks} ranks have no room for the model and a request")
    # Requests are spread evenly: some replicas may have one more than the others.
    share, more = divmod(requests, replicas)
    loads = [(min(share + 1, places), more), (min(share, places), replicas - more)]
    throughput = 0.0
    busiest: tuple[Pass, Pass, float] | None = None
    for running, number in loads:
        if not running or not number:
            continue
        block, full = passes(model, machine, workload, ranks, running, measured)
        rounds = (workload.steps - workload.full_passes) * block.seconds
        rounds += workload.full_passes * full.seconds
        throughput += number * running * workload.block / rounds
        busiest = busiest or (block, full, rounds)
    assert busiest is not None
    block, full, rounds = busiest
    exchanged = (workload.steps - workload.full_passes) * block.exchange
    exchanged += workload.full_passes * full.exchange
    return Estimate(
        ranks=ranks,
        replicas=replicas,
        requests=requests,
        running=next(running for running, number in loads if running and number),
        throughput=throughput,
        latency=rounds * workload.response / workload.block,
        block_step=block.seconds,
        full_pass=full.seconds,
        exchange=exchanged / rounds,
    )


def passes(
    model: Model,
    machine: Machine,
    workload: Workload,
    ranks: int,
    running: int,
    measured: Mapping[int, Measured] | None = None,
) -> tuple[Pass, Pass]:
    """Return a block step of all requests, and the full passes that run each request once.

    ``measured`` has times by the number of ranks, 1 among them. Times for ``ranks`` are used as
    they are; without them, the work is the time of one device divided by the ranks.
    """
    keys = workload.slots
    block = model_pass(
        model,
        machine,
        ranks,
        running,
        workload.block,
        keys,
        keys - workload.block,
        workload.block,
        chooses=False,
    )
    at_once = min(running, max(1, workload.tokens_per_pass // workload.length))
    one_full = model_pass(
        model,
        machine,
        ranks,
        at_once,
        workload.length,
        workload.length,
        0,
        workload.block,
        chooses=workload.keep < 1,
    )
    if measured is not None:
        times = measured.get(ranks, measured[1])
        rows = running * workload.block
        block = _with_work(block, Measured.at(times.block, rows), ranks, ranks in measured)
        rows = at_once * workload.length
        one_full = _with_work(one_full, Measured.at(times.full, rows), ranks, ranks in measured)
    return block, one_full * (running / at_once)


def _with_work(estimated: Pass, seconds: float, ranks: int, whole: bool) -> Pass:
    """Return a pass based on a measured time.

    Args:
        estimated: The same pass by the roofline.
        seconds: The measured time.
        ranks: Tensor-parallel ranks.
        whole: Whether ``seconds`` is for all ranks, exchange included, or else for one device.
    """
    if whole:
        exchange = min(estimated.exchange, seconds)
        return Pass(seconds - exchange, exchange, 0.0)
    # The measured time includes the host's part; dividing it by the ranks too is optimistic.
    return replace(estimated, work=seconds / ranks, host=0.0)


def stops_growing(estimates: list[Estimate], gain: float = 0.5) -> Estimate:
    """Return the last estimate before adding devices is no longer worth it.

    Args:
        estimates: Estimates by rising number of devices.
        gain: Share of proportional growth that more devices must yield: with 0.5, twice the
            devices must yield half as much throughput again.
    """
    for now, after in zip(estimates, estimates[1:], strict=False):
        proportional = after.devices / now.devices - 1
        if after.throughput / now.throughput - 1 < gain * proportional:
            return now
    return estimates[-1]
