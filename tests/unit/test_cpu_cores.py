# SPDX-License-Identifier: Apache-2.0
"""Which cores the workers of a machine get, and how their threads wait."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_dllm.engine import config, cpu_cores
from vllm_sparse_dllm.engine.cpu_cores import BINDING, bind_ray_worker, bind_workers, shares
from vllm_sparse_dllm.engine.omp_waiting import WAITING, wait_shortly
from vllm_sparse_dllm.plugin import RAY_ON_CPU


def machine(num_nodes: int, cores_of_a_node: int, threads: int) -> list[Any]:
    """Return logical CPUs as Linux numbers them: first threads of all cores, then second ones."""
    num_cores = num_nodes * cores_of_a_node
    return [
        SimpleNamespace(
            id=thread * num_cores + core, physical_core=core, numa_node=core % num_nodes
        )
        for thread in range(threads)
        for core in range(num_cores)
    ]


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(cpu_cores, "get_allowed_cpu_list", lambda: machine(1, 2, 1))
    monkeypatch.setattr(cpu_cores, "_own_binding", None)
    monkeypatch.delenv(BINDING, raising=False)
    return monkeypatch


def parallel(ranks: int, replicas: int = 1, use_ray: bool = False) -> Any:
    return SimpleNamespace(
        local_world_size=ranks, data_parallel_size_local=replicas, use_ray=use_ray
    )


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 2), st.integers(1, 20))
def test_shares(num_nodes: int, cores: int, threads: int, num_workers: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_cores, "get_allowed_cpu_list", lambda: machine(num_nodes, cores, threads))
        found = shares(num_workers)
    num_cores = num_nodes * cores
    assert len(found) == num_workers
    assert {core for own in found for core in own} == set(range(num_cores))
    sizes = {len(own) for own in found}
    if num_cores >= num_workers:
        assert sum(map(len, found)) == num_cores
        assert max(sizes) - min(sizes) <= 1
    else:
        assert sizes == {1}
    nodes = [own[0] % num_nodes for own in found]
    assert nodes == sorted(nodes)


def test_workers_are_bound(two_cores: pytest.MonkeyPatch) -> None:
    bind_workers(parallel(1))
    assert BINDING not in os.environ
    bind_workers(parallel(2))
    assert os.environ[BINDING] == "0|1"
    bind_workers(parallel(1, replicas=2))
    assert os.environ[BINDING] == "0|1"
    bind_workers(parallel(2, replicas=2))
    assert os.environ[BINDING] == "0|0|1|1"
    bind_workers(parallel(1))
    assert BINDING not in os.environ


def test_what_a_user_set_wins(two_cores: pytest.MonkeyPatch) -> None:
    two_cores.setenv(BINDING, "1|0")
    bind_workers(parallel(2))
    assert os.environ[BINDING] == "1|0"


def test_workers_on_ray_bind_themselves(two_cores: pytest.MonkeyPatch) -> None:
    bind_workers(parallel(2, use_ray=True))
    assert BINDING not in os.environ


@pytest.fixture
def bound(two_cores: pytest.MonkeyPatch) -> list[list[int]]:
    """Make this process the second of two workers of Ray; return a list of its bindings."""
    context = SimpleNamespace(
        get_accelerator_ids=lambda: {"GPU": ["1"]}, get_node_id=lambda: "this"
    )
    nodes = [{"NodeID": "that", "Resources": {}}, {"NodeID": "this", "Resources": {"GPU": 2.0}}]
    found: list[list[int]] = []
    two_cores.setattr(ray, "get_runtime_context", lambda: context)
    two_cores.setattr(ray, "nodes", lambda: nodes)
    two_cores.setattr(cpu_cores, "current_platform", SimpleNamespace(ray_device_key="GPU"))
    two_cores.setattr(cpu_cores.torch, "set_num_threads", lambda number: None)
    two_cores.setattr(os, "sched_setaffinity", lambda process, ids: found.append(list(ids)))
    return found


@pytest.mark.parametrize(
    ("binding", "cores"),
    [(None, [[1]]), ("", [[1]]), ("auto", [[1]]), ("1|0", [[0]]), ("nobind", [])],
)
def test_cores_of_a_worker_on_ray(
    binding: str | None,
    cores: list[list[int]],
    bound: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if binding is not None:
        monkeypatch.setenv(BINDING, binding)
    bind_ray_worker()
    assert bound == cores


def test_a_worker_on_ray_without_a_list(
    bound: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BINDING, "0-1")
    with pytest.raises(ValueError, match=f"{BINDING} must have a list .* got '0-1' for worker 1"):
        bind_ray_worker()
    assert not bound


@pytest.mark.parametrize("chosen", [{}, *({name: "1"} for name in WAITING)])
def test_how_threads_wait_is_the_users_choice(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    for name in WAITING:
        # Makes monkeypatch restore the variable, even if it was unset.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        wait_shortly()
    found = {name: os.environ[name] for name in WAITING if name in os.environ}
    assert found == (chosen or WAITING)


@pytest.mark.parametrize(
    ("exported", "given_", "expected"),
    [
        ({}, {}, WAITING),
        ({}, {"OTHER": "1"}, WAITING | {"OTHER": "1"}),
        ({}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        # An earlier engine has set the package's values.
        (WAITING, {}, WAITING),
        (WAITING, {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "6"}, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_how_threads_on_ray_wait_is_the_users_choice(
    monkeypatch: pytest.MonkeyPatch,
    exported: dict[str, str],
    given_: dict[str, str],
    expected: dict[str, str],
) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(config, "current_platform", SimpleNamespace(ray_device_key="CPU"))
    parallel = SimpleNamespace(ray_runtime_env={"env_vars": given_, "pip": []})
    config._prepare_ray(parallel)
    assert parallel.ray_runtime_env == {"env_vars": {RAY_ON_CPU: "1", **expected}, "pip": []}
