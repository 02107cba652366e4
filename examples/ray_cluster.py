# SPDX-License-Identifier: Apache-2.0
"""What the Ray examples have in common: the cluster, and the environment of a replica."""

from __future__ import annotations

import os

import ray

#: Bytes of a local cluster's object store: prompts and answers are small.
OBJECT_STORE = 256 << 20

#: For the processes of a replica. On a CPU it has as many threads as Ray gave it cores (Ray sets
#: ``OMP_NUM_THREADS``), on any of them: vLLM by itself would bind each to all cores. They share
#: the machine with each other and with Ray, so threads that wait sleep at once.
REPLICA_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONWARNINGS": "ignore",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
}


def connect() -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start one on this machine.

    A local cluster ends with this process.
    """
    if os.environ.get("RAY_ADDRESS"):
        ray.init()
    else:
        # vLLM waits for nothing in Ray's dashboard, and it costs a process.
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE)
