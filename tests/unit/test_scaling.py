# SPDX-License-Identifier: Apache-2.0
"""The estimate of throughput on several devices, in cases where the answer is known."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scripts import EXAMPLES, load

model, run = load(EXAMPLES / "scaling", "model", "run")
LLADA, H100, WORKLOAD = model.Model(), run.H100, model.Workload()
NO_LINK = model.Link(1e30, 0.0)
NO_HOST = replace(H100, host_layer=0.0, host_request=0.0, host_step=0.0)


def test_sizes_are_those_of_the_published_checkpoint() -> None:
    # 8.0 billion parameters; norms are left out.
    assert LLADA.weight_bytes / LLADA.element == pytest.approx(8.015e9, rel=1e-3)
    # 2 (key, value) x 2 bytes x 32 layers x 4096.
    assert LLADA.slot_bytes == 524288


@given(size=st.floats(1, 1e9), ranks=st.integers(2, 64))
def test_collectives(size: float, ranks: int) -> None:
    link = model.Link(1e9, 1e-6)
    assert link.all_reduce(size, 1) == link.all_gather(size, 1) == 0
    assert link.all_reduce(size, 2) == pytest.approx(1e-6 + size / 1e9)
    assert link.all_gather(size, ranks) < link.all_reduce(size, ranks) < 1e-6 + 2 * size / 1e9


@given(replicas=st.integers(1, 64), requests=st.integers(1, 1000))
def test_one_rank_exchanges_nothing(replicas: int, requests: int) -> None:
    assert model.estimate(LLADA, H100, WORKLOAD, 1, replicas, requests).exchange == 0


@given(replicas=st.integers(1, 64), share=st.integers(1, 100))
def test_data_parallel_is_proportional_at_equal_load(replicas: int, share: int) -> None:
    one = model.estimate(LLADA, H100, WORKLOAD, 1, 1, share)
    many = model.estimate(LLADA, H100, WORKLOAD, 1, replicas, share * replicas)
    assert many.throughput == pytest.approx(replicas * one.throughput)
    assert many.latency == one.latency


@given(requests=st.integers(1, 64), more=st.integers(0, 64))
def test_more_replicas_than_requests_bring_nothing(requests: int, more: int) -> None:
    enough = model.estimate(LLADA, H100, WORKLOAD, 1, requests, requests)
    many = model.estimate(LLADA, H100, WORKLOAD, 1, requests + more, requests)
    assert many.throughput == pytest.approx(enough.throughput)


@given(requests=st.integers(1, 150), power=st.integers(0, 3))
def test_ranks_without_exchange_and_host_are_proportional(requests: int, power: int) -> None:
    machine = replace(NO_HOST, inside=NO_LINK, between=NO_LINK)
    one = model.estimate(LLADA, machine, WORKLOAD, 1, 1, requests)
    many = model.estimate(LLADA, machine, WORKLOAD, 1 << power, 1, requests)
    assert many.throughput == pytest.approx((1 << power) * one.throughput)


@given(requests=st.integers(1, 150), power=st.integers(1, 5))
def test_throughput_of_ranks_is_bounded(requests: int, power: int) -> None:
    ranks = 1 << power
    one = model.estimate(LLADA, NO_HOST, WORKLOAD, 1, 1, requests)
    many = model.estimate(LLADA, NO_HOST, WORKLOAD, ranks, 1, requests)
    assert many.throughput < ranks * one.throughput
    assert 0 < many.exchange < 1


def test_requests_beyond_the_memory_wait() -> None:
    places = model.room(LLADA, H100, WORKLOAD, 1)
    assert places == (0.9 * 80e9 - LLADA.weight_bytes) // (WORKLOAD.slots * 524288)
    full = model.estimate(LLADA, H100, WORKLOAD, 1, 1, places)
    more = model.estimate(LLADA, H100, WORKLOAD, 1, 1, places + 500)
    assert more.running == places
    assert more.throughput == full.throughput


def test_heads_that_are_fewer_than_ranks_are_stored_more_than_once() -> None:
    few = replace(LLADA, kv_heads=4)
    machine = replace(H100, memory=1e12)
    at_four, at_eight = (model.room(few, machine, WORKLOAD, ranks) for ranks in (4, 8))
    assert at_eight == pytest.approx(at_four, rel=0.02)


def test_what_is_hidden_by_the_network_between_nodes() -> None:
    inside = model.estimate(LLADA, NO_HOST, WORKLOAD, 8, 1, 64)
    across = model.estimate(LLADA, NO_HOST, WORKLOAD, 16, 1, 64)
    assert across.exchange > 2 * inside.exchange
    assert across.throughput < inside.throughput


def test_keeping_less_leaves_room_for_more() -> None:
    rooms = [model.room(LLADA, H100, replace(WORKLOAD, keep=keep), 1) for keep in (1.0, 0.5, 0.25)]
    assert rooms == sorted(rooms)
    assert rooms[1] == pytest.approx(2 * rooms[0], rel=0.1)


def test_measured_times_take_the_place_of_the_roofline() -> None:
    measured = model.Measured(((32, 0.1), (64, 0.3)), ((1280, 2.0),))
    at = model.Measured.at
    assert [at(measured.block, rows) for rows in (1, 32, 48, 64, 128)] == pytest.approx(
        [0.1, 0.1, 0.2, 0.3, 0.6]
    )
    one = model.estimate(LLADA, H100, WORKLOAD, 1, 1, 1, {1: measured})
    assert one.block_step == 0.1
    assert one.full_pass == 2.0
    # 30 block steps and 2 full passes give 32 tokens.
    assert one.throughput == pytest.approx(32 / (30 * 0.1 + 2 * 2.0))
    assert one.latency == pytest.approx(8 * (30 * 0.1 + 2 * 2.0))


@pytest.mark.parametrize("points", [(), ((32, 0.0),), ((64, 0.1), (32, 0.1)), ((0, 0.1),)])
def test_measured_times_must_be_in_order(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="block must be pairs of rows and seconds"):
        model.Measured(points, ((1280, 2.0),))


def test_ranks_that_were_measured_are_taken_as_they_are() -> None:
    one = model.Measured(((32, 0.1),), ((1280, 2.0),))
    two = model.Measured(((32, 0.07),), ((1280, 1.5),))
    taken, four = (
        model.estimate(LLADA, NO_HOST, WORKLOAD, ranks, 1, 1, {1: one, 2: two}) for ranks in (2, 4)
    )
    assert taken.throughput == pytest.approx(32 / (30 * 0.07 + 2 * 1.5))
    assert 0 < taken.exchange < 1
    # Ranks that were not measured: the time of one device over the ranks, plus the exchange.
    exchange = model.estimate(LLADA, NO_HOST, WORKLOAD, 4, 1, 1).exchange
    assert exchange > 0
    assert four.block_step > 0.1 / 4
    assert four.full_pass > 2.0 / 4


@given(bandwidth=st.floats(1e6, 1e12), latency=st.floats(0, 1e-2), ranks=st.integers(2, 16))
def test_a_link_is_found_from_what_all_reduces_took(
    bandwidth: float, latency: float, ranks: int
) -> None:
    link = model.Link(bandwidth, latency)
    points = [(size, link.all_reduce(size, ranks)) for size in (1e8, 1e4)]
    found = model.Link.measured(ranks, points)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-3)
    assert found.latency == pytest.approx(latency, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("points", [[(1e4, 0.1)], [(1e4, 0.1), (1e6, 0.1)], [(1, 0), (2, 1)]])
def test_a_link_needs_two_sizes(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="must be of two sizes, the larger one slower"):
        model.Link.measured(2, points)


def test_ranks_that_the_engine_refuses() -> None:
    def ranks(**sizes: int) -> list[int]:
        network = model.Model(**sizes)
        return [number for number in range(1, 33) if network.can_be_divided(number)]

    assert ranks() == [1, 2, 4, 8, 16, 32]
    # Dream-7B: 28 heads, 4 of keys and values.
    assert ranks(width=3584, heads=28, kv_heads=4, mlp=18944, vocab=152064) == [1, 2, 4]


def test_where_growth_stops() -> None:
    # 8 requests: throughput grows up to one replica for each.
    estimates = [model.estimate(LLADA, H100, WORKLOAD, 1, 1 << power, 8) for power in range(7)]
    assert model.stops_growing(estimates, gain=0.0).devices == 64
    assert model.stops_growing(estimates, gain=0.01).devices == 8


@pytest.mark.parametrize(
    ("ranks", "replicas", "requests", "message"),
    [
        (0, 1, 1, "ranks must be at least 1, got 0"),
        (1, 0, 1, "replicas must be at least 1, got 0"),
        (1, 1, 0, "requests must be at least 1, got 0"),
    ],
)
def test_refused(ranks: int, replicas: int, requests: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.estimate(LLADA, H100, WORKLOAD, ranks, replicas, requests)


def test_a_model_that_does_not_fit() -> None:
    small = replace(H100, memory=10e9)
    with pytest.raises(ValueError, match="1 ranks have no room for the model and a request"):
        model.estimate(LLADA, small, WORKLOAD, 1, 1, 1)
    assert model.estimate(LLADA, small, WORKLOAD, 2, 1, 1).running == 1


def write_measured(path: Path, **content: Any) -> None:
    """Write a file as `measure.py` does, for one rank unless ``content`` replaces it."""
    times = {"block": [[32, 0.01]], "full": [[1280, 0.1]], "all_reduce": []}
    rest = {"model": asdict(LLADA), "ranks": 1, "prompt": 1248, "keep": 0.5}
    path.write_text(json.dumps({**times, **rest, **content}))


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, written = tmp_path / "measured.json", tmp_path / "estimate.json"
    write_measured(measured)
    run.main(["--requests", "1,16", "--measured", str(measured), "--json", str(written)])
    assert "measured for 1 ranks, with a prompt of 1248" in capsys.readouterr().out
    content = json.loads(written.read_text())
    assert content["measured"] == [1]
    assert {(one["ranks"], one["replicas"]) for one in content["node"]} == {
        (1, 8),
        (2, 4),
        (4, 2),
        (8, 1),
    }
    one = next(one for one in content["node"] if one["ranks"] == 1 and one["requests"] == 1)
    assert one["throughput"] == pytest.approx(32 / (30 * 0.01 + 2 * 0.1))


def test_program_with_measured_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    write_measured(one)
    # A link of 1 us and 1 GB/s; in an all-reduce of two ranks each sends every byte once.
    row = 8192
    reduced = [[rows, 1e-6 + rows * row / 1e9] for rows in (32, 1280)]
    write_measured(two, ranks=2, all_reduce=reduced, full=[[1280, 0.5]])
    run.main(["--measured", str(two), str(one)])
    printed = capsys.readouterr().out
    assert "measured for 1 and 2 ranks" in printed
    assert "1 us and 1.00 GB/s" in printed
    # 65 all-reduces, and an all-gather of the logits of a block.
    exchange = 65 * reduced[1][1] + 1e-6 + 32 * 126464 * 2 / 2 / 1e9
    assert f"1280 rows: 500.0, estimated {1000 * (0.05 + exchange):.1f}" in printed


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        {"model": {"name": 1}},
        {"block": [[32, float("nan")]]},
        {"ranks": 2},
        {"ranks": 2, "all_reduce": [[32, 0.1], [64, 0.1]]},
    ],
)
def test_files_that_are_not_measured_times(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(content) if isinstance(content, str) else write_measured(path, **content)
    with pytest.raises(SystemExit, match="has no measured times"):
        run.main(["--measured", str(path)])


def test_measured_files_that_do_not_belong_together(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    reduced = [[32, 0.1], [64, 0.2]]
    write_measured(one)
    for content, message in (
        ({}, "one more file of 1 ranks"),
        ({"ranks": 2, "all_reduce": reduced, "prompt": 5}, "another model, prompt or keep"),
    ):
        write_measured(other, **content)
        with pytest.raises(SystemExit, match=message):
            run.main(["--measured", str(one), str(other)])
    write_measured(other, ranks=2, all_reduce=reduced)
    with pytest.raises(SystemExit, match="none of the measured files is of one device"):
        run.main(["--measured", str(other)])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--requests=8,0", "--requests: must be at least 1, got 0"),
        ("--devices=0", "--devices: must be at least 1, got 0"),
        ("--block=0", "block must be at least 1, got 0"),
        ("--prompt=-1", "prompt must be at least 1, got -1"),
        ("--keep=5", "keep must be above 0 and at most 1, got 5.0"),
        ("--keep=nan", "keep must be above 0 and at most 1, got nan"),
    ],
)
def test_arguments_are_checked(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run.main([argument])
    assert message in f"{end.value} {capsys.readouterr().err}"
