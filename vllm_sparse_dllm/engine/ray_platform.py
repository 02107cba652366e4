# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform with the Ray resource that the Ray executor needs.

This module is imported only if the user asks for it (`plugin.platform`).
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
    """A CPU platform whose workers each take one of Ray's "GPU" resources.

    Here a "GPU" is only a place for a worker. It has to have this name: vLLM asks Ray which one a
    worker got, and Ray numbers only the accelerators it knows, not resources that users define.
    """

    ray_device_key = "GPU"
