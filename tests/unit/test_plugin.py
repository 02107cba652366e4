# SPDX-License-Identifier: Apache-2.0
"""The entry point that offers vLLM a platform."""

from __future__ import annotations

import pytest
import vllm.platforms
from vllm.platforms import current_platform

from vllm_sparse_dllm.plugin import RAY_ON_CPU, platform


@pytest.mark.parametrize("value", [None, "", "0", "false"])
def test_vllm_keeps_its_own_platform(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RAY_ON_CPU, raising=False)
    if value is not None:
        monkeypatch.setenv(RAY_ON_CPU, value)
    assert platform() is None


def test_the_platform_for_ray_is_vllms_with_a_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_ON_CPU, "1")
    assert platform() == "vllm_sparse_dllm.engine.ray_platform.RayCPUPlatform"
    from vllm_sparse_dllm.engine.ray_platform import RayCPUPlatform

    assert issubclass(RayCPUPlatform, type(current_platform))
    assert RayCPUPlatform.ray_device_key and not current_platform.ray_device_key
    # It does not warn of the variable, whatever an engine of another test has left there.
    monkeypatch.delenv("VLLM_DIST_IDENT", raising=False)
    RayCPUPlatform.validate_environ(hard_fail=True)


def test_a_gpu_has_a_resource_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_ON_CPU, "1")
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: None)
    assert platform() is None
