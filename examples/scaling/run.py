# SPDX-License-Identifier: Apache-2.0
"""Estimate where throughput stops growing: tensor parallel, data parallel, or both.

Everything that it prints is an estimate (`model.py` describes the model). With ``--measured`` the
times of passes come from measurements: of one device, and of any further numbers of
tensor-parallel ranks, one file each. Files of several ranks also give the exchange inside a node,
and the report then compares the estimates for those ranks with what they took.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from model import (
    Estimate,
    Link,
    Machine,
    Measured,
    Model,
    Workload,
    estimate,
    passes,
    room,
    stops_growing,
)

#: Data sheets give 989e12, 3.35e12, 80e9, 450e9 and 50e9. The shares of the first two that are
#: achieved (0.6, 0.8), the latencies and the host's times are guesses until they are measured.
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
#: A device is a core; two cores share a machine, its memory and a 10 Gb/s network. All are guesses;
#: with ``--measured``, measurements replace those of passes and, with a file of several ranks, of
#: the link inside a node.
CPU = Machine(
    flops=400e9,
    bandwidth=10e9,
    memory=8e9,
    devices_per_node=2,
    inside=Link(5e9, 50e-6),
    between=Link(1.25e9 / 2, 100e-6),
)
MACHINES = {"h100": H100, "cpu": CPU}


def at_least_one(text: str) -> int:
    """Parse a whole number that must be at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


@dataclass(frozen=True)
class File:
    """The content of a file written by `measure.py`.

    Attributes:
        model: The network.
        ranks: Tensor-parallel ranks.
        times: Times of passes.
        link: The link between the ranks, if there are several.
        prompt: Tokens of each prompt; the response was one block.
        keep: The keep ratio.
    """

    model: Model
    ranks: int
    times: Measured
    link: Link | None
    prompt: int
    keep: float


def read_measured(path: Path) -> File:
    """Read a file written by `measure.py`.

    Raises:
        SystemExit: If it is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = {
            name: tuple((int(rows), float(seconds)) for rows, seconds in content[name])
            for name in ("block", "full", "all_reduce")
        }
        model, ranks = Model(**content["model"]), int(content["ranks"])
        link = None
        if ranks > 1:
            row = model.width * model.element
            sizes = [(float(rows * row), seconds) for rows, seconds in points["all_reduce"]]
            link = Link.measured(ranks, sizes)
        times = Measured(points["block"], points["full"])
        return File(model, ranks, times, link, int(content["prompt"]), float(content["keep"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {path} has no measured times: {error!r}") from error


def read_all(paths: list[Path]) -> dict[int, File]:
    """Read files, return them by their number of ranks.

    Raises:
        SystemExit: If they do not belong together, or none of them is of one device.
    """
    files: dict[int, File] = {}
    for path in paths:
        file = read_measured(path)
        if file.ranks in files:
            raise SystemExit(f"error: {path} is one more file of {file.ranks} ranks")
        files[file.ranks] = file
        first = next(iter(files.values()))
        if (file.model, file.prompt, file.keep) != (first.model, first.prompt, first.keep):
            raise SystemExit(f"error: {path} is of another model, prompt or keep than {paths[0]}")
    if 1 not in files:
        raise SystemExit("error: none of the measured files is of one device")
    return files


def differences(machine: Machine, files: dict[int, File]) -> str:
    """Return, for each pass of several ranks, its time and the estimate from one device's times."""
    lines = ["Passes of several ranks, in ms, and as estimated from those of one device:"]
    one = files[1]
    for ranks in sorted(files.keys() - {1}):
        for kind in ("block", "full"):
            # Full passes were measured without a cache, so they did not choose which keys to keep.
            workload = Workload(
                prompt=one.prompt,
                response=Workload.block,
                keep=one.keep if kind == "block" else 1.0,
                tokens_per_pass=1 << 40,
            )
            for rows, seconds in getattr(files[ranks].times, kind):
                requests = rows // (workload.block if kind == "block" else workload.length)
                found = passes(one.model, machine, workload, ranks, requests, {1: one.times})
                estimated = found[kind == "full"].seconds
                lines.append(
                    f"  TP {ranks}, {kind} pass, {rows} rows: {1000 * seconds:.1f}, estimated "
                    f"{1000 * estimated:.1f} ({estimated / seconds - 1:+.0%})"
                )
    return "\n".join(lines)


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


def layouts(devices: int) -> list[tuple[int, int]]:
    """Return tensor- and data-parallel sizes that use all devices, with powers of two as ranks."""
    ranks = [1 << power for power in range(devices.bit_length())]
    return [(r, devices // r) for r in ranks if devices % r == 0]


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
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="times of passes, from measure.py: of one device, and of any numbers of ranks",
    )
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    machine, model = MACHINES[options.machine], Model()
    files: dict[int, File] = {}
    if options.no_host:
        machine = replace(machine, host_layer=0.0, host_request=0.0, host_step=0.0)
    if options.measured:
        files = read_all(options.measured)
        model = files[1].model
        link = files[max(files)].link
        machine = replace(machine, inside=link) if link else machine
    measured = {ranks: file.times for ranks, file in files.items()} or None
    try:
        given = {field.name: getattr(options, field.name) for field in fields(Workload)}
        workload = Workload(**given)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error

    def of(ranks: int, replicas: int, requests: int) -> Estimate:
        return estimate(model, machine, workload, ranks, replicas, requests, measured)

    if measured:
        print(
            f"Times of passes are measured for {' and '.join(map(str, sorted(files)))} ranks, with "
            f"a prompt of {files[1].prompt} and keep {files[1].keep}; all else is estimated."
        )
    else:
        print("Times of passes are estimated, and so is all else.")
    if len(files) > 1:
        link = machine.inside
        print(
            f"Exchange inside a node is measured: {1e6 * link.latency:.0f} us and "
            f"{link.bandwidth / 1e9:.2f} GB/s."
        )
        print(differences(machine, files))
    print(f"A request holds {workload.slots * model.slot_bytes / 1e6:,.1f} MB of pages.\n")
    sizes_of_node = [
        (ranks, replicas)
        for ranks, replicas in layouts(options.devices)
        if model.can_be_divided(ranks) and room(model, machine, workload, ranks)
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
            if model.can_be_divided(count) and room(model, machine, workload, count)
        ]
        growth[f"DP, {requests} requests"] = [
            of(1, count, requests) for count in counts if room(model, machine, workload, 1)
        ]
    print("\nThe number of devices up to which doubling them gives half as much again each time:")
    for name, estimates in growth.items():
        if estimates:
            last = stops_growing(estimates)
            print(f"  {name:<20}{last.devices:>4} devices, {last.throughput:,.1f} tokens/s")
    if options.json:
        content = {
            "measured": sorted(files),
            "model": asdict(model),
            "machine": asdict(machine),
            "workload": asdict(workload),
            "node": [asdict(one) for one in node],
            "growth": {name: [asdict(one) for one in those] for name, those in growth.items()},
        }
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
