# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, with a Ray resource: what Ray's executor misses on a CPU.

Nothing here is imported unless the user asks for it (`plugin.platform`).
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_sparse_dllm.plugin import RAY_ON_CPU, announce

announce(RAY_ON_CPU)

# CpuPlatform, or its variant for AMD's Zen.
_Base: Any = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


class RayCPUPlatform(_Base):
    """A CPU platform whose workers each take one "GPU" of Ray's.

    The word means no more than one place for a worker. It has to be this one: vLLM asks Ray
    which of them a worker got, and Ray numbers its known accelerators only, not resources that
    users define.
    """

    ray_device_key = "GPU"
