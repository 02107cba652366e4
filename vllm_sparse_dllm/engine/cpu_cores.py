# SPDX-License-Identifier: Apache-2.0
"""Which CPU cores each worker of a machine gets: equal shares that do not overlap.

By default vLLM gives each worker of an engine a NUMA node: it does not start if there are more
workers than nodes, and replicas get the same cores.
"""

from __future__ import annotations

import os

import torch
from vllm.config import ParallelConfig
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, parse_id_list

BINDING = "VLLM_CPU_OMP_THREADS_BIND"

#: The value that this module set the variable to, to distinguish it from a user's.
_own_binding: str | None = None


def shares(num_workers: int) -> list[list[int]]:
    """Divide the cores that this process may use, keeping neighbours together.

    Of a core with several hardware threads only the first is used. If there are more workers
    than cores, some share a core.

    Returns:
        The logical CPUs of each worker, at least one.
    """
    cores: dict[tuple[int, int], int] = {}
    for cpu in sorted(get_allowed_cpu_list(), key=lambda cpu: cpu.id):
        cores.setdefault((cpu.numa_node, cpu.physical_core), cpu.id)
    ids = [cores[key] for key in sorted(cores, key=lambda key: (key[0], cores[key]))]
    if num_workers > len(ids):
        return [[ids[worker * len(ids) // num_workers]] for worker in range(num_workers)]
    bounds = [worker * len(ids) // num_workers for worker in range(num_workers + 1)]
    return [ids[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]


def bind_workers(parallel: ParallelConfig) -> None:
    """Tell vLLM's multi-process executor which cores its workers get, unless the user did.

    A single worker is left to vLLM.
    """
    global _own_binding
    if os.environ.get(BINDING) == _own_binding:
        # Set for an earlier engine, which may have had another number of workers.
        os.environ.pop(BINDING, None)
        _own_binding = None
    num_workers = parallel.local_world_size * parallel.data_parallel_size_local
    if os.environ.get(BINDING) or num_workers <= 1 or parallel.use_ray:
        return
    _own_binding = "|".join(",".join(map(str, ids)) for ids in shares(num_workers))
    os.environ[BINDING] = _own_binding


def bind_ray_worker() -> None:
    """Bind this process, a worker that Ray started, to its share of the machine's cores.

    Ray numbers the places of a machine, whichever engine they belong to; each gets an equal
    share. Must run before the process has started threads of its own.
    """
    import ray

    binding = os.environ.get(BINDING) or "auto"
    if binding == "nobind":
        return
    context = ray.get_runtime_context()
    key = current_platform.ray_device_key
    place = int(context.get_accelerator_ids()[key][0])
    if binding == "auto":
        own_node = context.get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == own_node)
        ids = shares(int(node["Resources"][key]))[place]
    else:
        lists = binding.split("|")
        if place >= len(lists):
            raise ValueError(
                f"{BINDING} must have a list of cores for each worker of the machine, "
                f"got {binding!r} for worker {place}"
            )
        ids = parse_id_list(lists[place])
    os.sched_setaffinity(0, ids)
    torch.set_num_threads(len(ids))
