# SPDX-License-Identifier: Apache-2.0
"""The entry points: the releases of vLLM that they serve, and the platform for Ray."""

from __future__ import annotations

import logging

import pytest
import vllm
import vllm.platforms
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.platforms import current_platform

from vllm_sparse_dllm import plugin
from vllm_sparse_dllm.models.configs import LLADA_ARCHITECTURE
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
    # RAY_ON_CPU is a known variable; the deleted one may be left over from another test's engine.
    monkeypatch.delenv("VLLM_DIST_IDENT", raising=False)
    RayCPUPlatform.validate_environ(hard_fail=True)


def test_a_gpu_has_a_resource_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_ON_CPU, "1")
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: None)
    assert platform() is None


@pytest.mark.parametrize(
    ("version", "served"),
    [
        ("0.32.0", True),
        ("0.32.1rc2+cpu", True),
        ("dev", True),
        ("0.0.0.dev5", True),
        ("0.1.dev1+g1234567", True),
        ("0.33.0", False),
        ("0.31.2", False),
        ("0.320.0", False),
        ("1.0", False),
    ],
)
def test_other_releases_of_vllm_are_left_alone(
    version: str, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.delitem(MODELS_CONFIG_MAP, LLADA_ARCHITECTURE, raising=False)
    # At vLLM's own logger, whose messages users see.
    logging.getLogger("vllm").addHandler(handler)
    try:
        plugin.register()
    finally:
        logging.getLogger("vllm").removeHandler(handler)
    assert (LLADA_ARCHITECTURE in MODELS_CONFIG_MAP) == served
    monkeypatch.setenv(RAY_ON_CPU, "1")
    assert (platform() is not None) == served
    messages = [record.getMessage() for record in records if record.levelno == logging.ERROR]
    assert len(messages) == (not served)
    assert all(f"stays out of vLLM {version}" in message for message in messages)
