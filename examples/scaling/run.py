# SPDX-License-Identifier: Apache-2.0
"""Estimate where throughput stops growing: tensor parallel, data parallel, or both.

Everything that it prints is an estimate (`model.py` says of what); with ``--measured`` the times
of passes on one device are measured, and the exchange between devices is still estimated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from model import Estimate, Link, Machine, Measured, Model, Workload, estimate, room, stops_growing

#: Data sheets say 989e12, 3.35e12, 80e9, 450e9 and 50e9; what is reached of the first two
#: (0.6, 0.8), latencies and the host's times are guesses to be replaced by measurements.
H100 = Machine(
    flops=0.6 * 989e12,
    bandwidth=0.8 * 3.35e12,
    memory=0.9 * 80e9,
    devices_per_node=8,
    inside=Link(450e9, 15e-6),
    between=Link(50e9, 40e-6),
    host_layer=80e-6,
    host_request=30e-6,
    host_step=1e-3,
)
#: Two shared cores and a network of 10 Gb/s; for what was measured here.
CPU = Machine(
    flops=150e9,
    bandwidth=12e9,
    memory=8e9,
    devices_per_node=1,
    inside=Link(5e9, 50e-6),
    between=Link(1.25e9, 100e-6),
)
MACHINES = {"h100": H100, "cpu": CPU}


def at_least_one(text: str) -> int:
    """Return the number in an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def read_measured(path: Path) -> tuple[Measured, Model]:
    """Return the times in a file of `measure.py`'s, and the model they are of.

    Raises:
        SystemExit: If it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = {
            name: tuple((int(rows), float(seconds)) for rows, seconds in content[name])
            for name in ("block", "full")
        }
        sizes = content.get("model", {})
        return Measured(points["block"], points["full"]), replace(Model(), **sizes)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {path} has no measured times: {error}") from error


def table(title: str, estimates: list[Estimate]) -> str:
    """Return estimates as a table."""
    head = ("TP", "DP", "requests", "running", "tokens/s", "latency s", "block ms", "exchange")
    rows = [head] + [
        (
            str(one.ranks),
            str(one.replicas),
            str(one.requests),
            str(one.running),
            f"{one.throughput:,.0f}" if one.throughput >= 100 else f"{one.throughput:.1f}",
            f"{one.latency:.2f}",
            f"{1000 * one.block_step:.2f}",
            f"{one.exchange:.0%}",
        )
        for one in estimates
    ]
    lines = ["".join(f"{cell:>11}" for cell in row) for row in rows]
    return "\n".join([title, *lines])


def layouts(devices: int, most_ranks: int) -> list[tuple[int, int]]:
    """Return tensor- and data-parallel sizes that use all devices, powers of two as ranks."""
    ranks = [1 << power for power in range(devices.bit_length())]
    return [(r, devices // r) for r in ranks if r <= most_ranks and devices % r == 0]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machine", choices=MACHINES, default="h100", help="default: %(default)s")
    parser.add_argument(
        "--devices", type=at_least_one, default=8, help="of one node; default: %(default)s"
    )
    parser.add_argument(
        "--most-devices", type=at_least_one, default=64, help="default: %(default)s"
    )
    parser.add_argument(
        "--requests",
        type=lambda text: [at_least_one(number) for number in text.split(",")],
        default=[1, 8, 32, 128, 512],
        help="requests at once; default: 1,8,32,128,512",
    )
    for field in fields(Workload):
        flag = f"--{field.name.replace('_', '-')}"
        kind = float if field.name == "keep" else int
        parser.add_argument(flag, type=kind, default=field.default, help="default: %(default)s")
    parser.add_argument(
        "--no-host",
        action="store_true",
        help="kernels cost the host nothing, as with one call for all requests and CUDA graphs",
    )
    parser.add_argument("--measured", type=Path, help="times of passes, from measure.py")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    machine, model, measured = MACHINES[options.machine], Model(), None
    if options.no_host:
        machine = replace(machine, host_layer=0.0, host_request=0.0, host_step=0.0)
    if options.measured:
        measured, model = read_measured(options.measured)
    try:
        given = {field.name: getattr(options, field.name) for field in fields(Workload)}
        workload = Workload(**given)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error

    def of(ranks: int, replicas: int, requests: int) -> Estimate:
        return estimate(model, machine, workload, ranks, replicas, requests, measured)

    source = "measured" if measured else "estimated"
    print(f"Times of passes on one device are {source}; all else is estimated.")
    print(f"A request holds {workload.slots * model.slot_bytes / 1e6:,.1f} MB of pages.\n")
    sizes_of_node = [
        (ranks, replicas)
        for ranks, replicas in layouts(options.devices, options.devices)
        if room(model, machine, workload, ranks)
    ]
    node = [
        of(ranks, replicas, requests)
        for requests in options.requests
        for ranks, replicas in sizes_of_node
    ]
    print(table(f"{options.devices} devices", node))
    growth: dict[str, list[Estimate]] = {}
    counts = [1 << power for power in range(options.most_devices.bit_length())]
    counts = [count for count in counts if count <= options.most_devices]
    for requests in options.requests:
        growth[f"TP, {requests} requests"] = [
            of(count, 1, requests)
            for count in counts
            if room(model, machine, workload, count) and count <= model.heads
        ]
        growth[f"DP, {requests} requests"] = [
            of(1, count, requests) for count in counts if room(model, machine, workload, 1)
        ]
    print("\nThe last number of devices at which twice as many would give half as much again:")
    for name, estimates in growth.items():
        if estimates:
            last = stops_growing(estimates)
            print(f"  {name:<20}{last.devices:>4} devices, {last.throughput:,.1f} tokens/s")
    if options.json:
        content = {
            "measured": bool(measured),
            "model": asdict(model),
            "machine": asdict(machine),
            "workload": asdict(workload),
            "node": [asdict(one) for one in node],
            "growth": {name: [asdict(one) for one in those] for name, those in growth.items()},
        }
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
