# SPDX-License-Identifier: Apache-2.0
"""Code shared by the Ray examples: the cluster connection and the environment of a replica."""

from __future__ import annotations

import os

import ray

#: Size of a local cluster's object store in bytes; prompts and answers are small.
OBJECT_STORE = 256 << 20

#: Environment of a replica's processes. On a CPU, a replica runs as many threads as Ray gave it
#: cores (Ray sets ``OMP_NUM_THREADS``) and does not pin them: by default vLLM would bind the
#: threads of every replica to all cores. Replicas share the machine with each other and with Ray,
#: so waiting threads sleep at once instead of spinning.
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
        # vLLM does not need Ray's dashboard, which would cost a process.
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE)
