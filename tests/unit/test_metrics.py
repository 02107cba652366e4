# SPDX-License-Identifier: Apache-2.0
"""Metrics without a model: causes of waiting and failing, figures of engines, documentation."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.request import StructuredOutputRequest

from tests.unit.test_scheduler import Spec, World, base_config
from vllm_sparse_dllm.engine.config import pages_of_an_engine
from vllm_sparse_dllm.engine.figures import FIGURES, EngineFigures, StepCounts
from vllm_sparse_dllm.frontend.metrics import METRICS, DiffusionStatLogger, install

ROOT = Path(__file__).parents[2]


def queued(world: World, num_steps: int) -> Counter[str]:
    """Run steps; count the causes of waiting (of each request and step) and of failures."""
    make_stats, found = world.scheduler.make_stats, Counter[str]()

    def noted(*args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = make_stats(*args, **kwargs)
        assert stats is not None and stats.kv_connector_stats is not None
        found.update(stats.kv_connector_stats[FIGURES]["queued"])
        found.update(stats.kv_connector_stats[FIGURES]["failures"])
        return stats

    world.scheduler.make_stats = noted  # type: ignore[method-assign]
    for _ in range(num_steps):
        world.step()
    world.scheduler.make_stats = make_stats  # type: ignore[method-assign]
    return found


def test_waiting_for_a_seat() -> None:
    world = World(max_num_seqs=3, budget=512)
    for _ in range(5):
        world.add(Spec())
    assert queued(world, 4) == {"max_num_seqs": 4 * 2}


def test_waiting_for_pages() -> None:
    world = World(num_pages=10, budget=512)
    for _ in range(3):
        world.add(Spec(prompt=200, response=16, settings={"cache_policy": "dual"}))  # 7 pages
    assert queued(world, 5) == {"pages": 5 * 2}


def test_waiting_for_the_token_budget() -> None:
    """Only two of three requests fit while they run full passes, for two steps."""
    world = World(budget=100)
    for _ in range(3):
        world.add(Spec(prompt=34, response=16))
    assert queued(world, 5) == {"token_budget": 2}


@pytest.mark.parametrize(("seats", "others"), [(3, {}), (1, {"max_num_seqs": 2})])
def test_waiting_for_a_grammar(seats: int, others: dict[str, int]) -> None:
    """Those whose grammar is being compiled wait for nothing else, also when no seat is free."""
    world = World(max_num_seqs=seats)
    world.add(Spec())
    world.step()
    names = [world.add(Spec()) for _ in range(2)]
    grammars: list[Future[Any]] = []
    for name in names:
        request = world.scheduler.requests[name]
        request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        grammars.append(Future())
        request.structured_output_request = StructuredOutputRequest(
            StructuredOutputsParams(regex="a"), grammars[-1]
        )
        world.scheduler.deferred_waiting.add(request)
    if others:
        world.add(Spec())
    assert queued(world, 2) == {"grammar": 2 * 2, **others}
    if others:
        # Compiled: from now on it waits as the others do.
        grammars[0].set_result(SimpleNamespace())
        assert queued(world, 2) == {"grammar": 2, "max_num_seqs": 2 * 2}
    for name in [*names, *world.waiting]:
        world.abort(name)
    world.drain()


def test_nobody_waits_where_nobody_runs() -> None:
    world = World()
    assert queued(world, 3) == {}


def test_failures() -> None:
    world = World()
    world.add(Spec(fails_at_run=2))
    world.add(Spec(fails_at_run=2))
    world.add(Spec())
    assert queued(world, 2) == {"logits": 2}


@pytest.fixture
def registry() -> Iterator[None]:
    """vLLM's metrics are global: remove them before and after a test."""
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


def figures(**steps: int) -> SchedulerStats:
    message = EngineFigures(StepCounts(**steps)).message(3, 10)
    return SchedulerStats(kv_connector_stats={FIGURES: message})


def value(name: str, engine: str) -> float | None:
    model = base_config().model_config.served_model_name
    labels = {"engine": engine, "model_name": model}
    return REGISTRY.get_sample_value("vllm:diffusion_" + name, labels)


@pytest.mark.usefixtures("registry")
def test_engines_are_told_apart() -> None:
    """With data parallelism each has its own figures, which vLLM's own loggers never see."""
    install()
    manager = StatLoggerManager(base_config(), engine_idxs=[0, 1])
    for engine, committed in ((0, 5), (1, 7), (1, 9)):
        stats = figures(full_passes=1, committed=committed)
        manager.record(stats, None, engine_idx=engine)
        assert stats.kv_connector_stats is None
    assert value("num_committed_tokens_total", "0") == 5
    assert value("num_committed_tokens_total", "1") == 16
    assert value("pages_held", "1") == 3
    manager.log()


@pytest.mark.usefixtures("registry")
def test_a_new_front_end_starts_anew() -> None:
    """As when a process creates a second engine, or engines are added to a running server."""
    install()
    for _ in range(2):
        manager = StatLoggerManager(base_config(), engine_idxs=[0])
        manager.record(figures(block_steps=2), None, engine_idx=0)
        assert value("block_steps_total", "0") == 2


@pytest.mark.usefixtures("registry")
def test_other_models_are_left_alone() -> None:
    install()
    config = copy.copy(base_config())
    config.model_config = copy.copy(config.model_config)
    config.model_config.__class__ = type(config.model_config).__mro__[1]
    manager = StatLoggerManager(config, engine_idxs=[0])
    assert not any(isinstance(own, DiffusionStatLogger) for own in manager.stat_loggers)


def table() -> list[tuple[str, str, str]]:
    """Return the rows of the documentation's table: name, causes and meaning."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(vllm:\w+)` \|(.*)\|(.*)\|$", text, flags=re.MULTILINE)
    return [(name, causes.strip().replace("`", ""), what.strip()) for name, causes, what in rows]


def test_the_documentation_has_every_metric() -> None:
    assert [(name, causes) for name, causes, _ in table()] == [
        (metric.sample, ", ".join(metric.causes)) for metric in METRICS
    ]


def test_the_dashboard_is_a_dashboard() -> None:
    """It has what Grafana needs: panels with queries, each in a place of its own.

    `test_metrics_server` checks that the metrics exist.
    """
    path = ROOT / "examples" / "grafana" / "diffusion.json"
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    assert dashboard["title"] and dashboard["uid"] and dashboard["schemaVersion"]
    places = set()
    for panel in dashboard["panels"]:
        assert panel["title"] and panel["targets"]
        place = panel["gridPos"]
        places |= {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        for target in panel["targets"]:
            assert "vllm:" in target["expr"] and target["legendFormat"]
    # What an operator looks for first.
    asked = {p["title"]: " ".join(t["expr"] for t in p["targets"]) for p in dashboard["panels"]}
    for title, name in (
        ("Waiting, by cause", "vllm:diffusion_queued_request_steps_total"),
        ("Pages of the cache", "vllm:diffusion_pages_held"),
        ("Tokens committed a step", "vllm:diffusion_num_committed_tokens_total"),
    ):
        assert name in asked[title]
    assert "sum by (cause)" in asked["Waiting, by cause"]
    sizes = [panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in dashboard["panels"]]
    assert len(places) == sum(sizes)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize(
    ("blocks", "replicas", "local", "local_only", "pages"),
    [
        (None, 1, 1, False, None),
        (0, 1, 1, False, None),
        (21, 1, 1, False, 20),
        (84, 4, 4, False, 20),
        # A front end of two of the four engines knows the sum of these two.
        (42, 4, 2, True, 20),
        # A front end whose engines all run elsewhere knows the sum of all.
        (84, 4, 0, False, 20),
    ],
)
def test_the_pages_of_one_engine(
    blocks: int | None, replicas: int, local: int, local_only: bool, pages: int | None
) -> None:
    """With hybrid load balancing (`local_only`), each machine has a front end for its engines."""
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=blocks),
        parallel_config=SimpleNamespace(
            data_parallel_size=replicas,
            data_parallel_size_local=local,
            local_engines_only=local_only,
        ),
    )
    assert pages_of_an_engine(config) == pages
