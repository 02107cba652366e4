# SPDX-License-Identifier: Apache-2.0
"""The estimate of throughput on several devices, where the answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
    one = model.estimate(LLADA, H100, WORKLOAD, 1, 1, 1, measured)
    assert one.block_step == 0.1
    assert one.full_pass == 2.0
    # 30 block steps and 2 full passes give 32 tokens.
    assert one.throughput == pytest.approx(32 / (30 * 0.1 + 2 * 2.0))
    assert one.latency == pytest.approx(8 * (30 * 0.1 + 2 * 2.0))


@pytest.mark.parametrize("points", [(), ((32, 0.0),), ((64, 0.1), (32, 0.1)), ((0, 0.1),)])
def test_measured_times_must_be_in_order(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="block must be pairs of rows and seconds"):
        model.Measured(points, ((1280, 2.0),))


def test_where_growth_stops() -> None:
    # 8 requests: up to one replica each.
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


def test_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured, written = tmp_path / "measured.json", tmp_path / "estimate.json"
    measured.write_text(json.dumps({"block": [[32, 0.01]], "full": [[1280, 0.1]]}))
    run.main(["--requests", "1,16", "--measured", str(measured), "--json", str(written)])
    printed = capsys.readouterr().out
    assert "Times of passes on one device are measured; all else is estimated." in printed
    content = json.loads(written.read_text())
    assert content["measured"] is True
    assert {(one["ranks"], one["replicas"]) for one in content["node"]} == {
        (1, 8),
        (2, 4),
        (4, 2),
        (8, 1),
    }
    one = next(one for one in content["node"] if one["ranks"] == 1 and one["requests"] == 1)
    assert one["throughput"] == pytest.approx(32 / (30 * 0.01 + 2 * 0.1))
    times = '"block": [[32, 0.01]], "full": [[1280, 0.1]]'
    named, odd = f'{{{times}, "model": {{"name": 1}}}}', f"{{{times}}}".replace("0.1", "NaN")
    for other in ("{}", "[]", named, odd):
        measured.write_text(other)
        with pytest.raises(SystemExit, match="has no measured times"):
            run.main(["--measured", str(measured)])


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
