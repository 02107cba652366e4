# SPDX-License-Identifier: Apache-2.0
"""The names of shared memory, what importing workers changes, and what vLLM asks of a runner."""

from __future__ import annotations

import ast
import inspect
import socket
import sys

import pytest
from vllm.v1.worker.gpu_worker import Worker

from tests.e2e.server import run_program
from vllm_sparse_dllm.engine.cpu_worker import shared_memory_name
from vllm_sparse_dllm.engine.runner import DiffusionModelRunner
from vllm_sparse_dllm.engine.worker import DiffusionGPUWorker


@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("tcp://10.0.0.1:1234", "1234"),
        ("tcp://[::1]:1234", "1234"),
        ("file:///tmp/some.where", "some.where"),
    ],
)
def test_memory_is_shared_by_the_ranks_of_a_machine(
    method: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for host in ("a", "a", "b"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        names.append(shared_memory_name(method))
    assert names == [f"{place}-a", f"{place}-a", f"{place}-b"]
    # The name of a file in /dev/shm.
    assert not any("/" in name for name in names)


IMPORTED = """
import importlib
import torch
import vllm.utils.torch_utils  # which has a `set_stream` of its own on every device

def functions():
    owners = (torch.cuda, torch.accelerator, torch.Tensor)
    names = ("Stream", "Event", "stream", "current_stream", "set_stream", "synchronize")
    names += ("empty_cache", "get_memory_info", "pin_memory", "record_stream")
    found = [getattr(owner, name, None) for owner in owners for name in names]
    return [*found, torch.Event]

before = functions()
import vllm_sparse_dllm.plugin
from vllm_sparse_dllm.engine.config import _SCHEDULER, _WORKERS
for path in (_WORKERS["{device}"], _SCHEDULER):
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name)
print("found:", "changed" if functions() != before else "the same")
"""


@pytest.mark.parametrize(("device", "found"), [("cuda", "the same"), ("cpu", "changed")])
def test_the_gpu_worker_leaves_pytorch_alone(device: str, found: str) -> None:
    """Importing vLLM's CPU worker replaces streams, events and memory figures by stand-ins."""
    output = run_program([sys.executable, "-c", IMPORTED.replace("{device}", device)])
    assert f"\nfound: {found}\n" in f"\n{output}"


#: Attributes of a runner that vLLM's worker names, but never reads from the package's runner.
NEVER_ASKED = {
    # LoRA adapters are refused.
    *("add_lora", "remove_lora", "list_loras", "pin_lora"),
    # Weight transfers are refused.
    "reset_lora_state",
    # For vLLM's second runner.
    "needs_cudagraph_capture",
    # There are no CUDA graphs of vLLM's own, no drafts and no encoders.
    *("profile_cudagraph_memory", "take_draft_token_ids", "get_encoder_timing_stats"),
    # Called only if the runner has it.
    "_init_kv_zero_meta",
}


def is_of_the_runner(node: ast.expr) -> bool:
    """Return whether an expression is an attribute of ``model_runner``."""
    owner = getattr(node, "value", None)
    return "model_runner" in (getattr(owner, "attr", None), getattr(owner, "id", None))


def test_the_runner_has_what_vllm_asks_for() -> None:
    """It has all that methods inherited from vLLM's worker read from `model_runner`."""
    tree = ast.parse(inspect.getsource(Worker))
    (worker,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    nodes = [
        node
        for method in worker.body
        if isinstance(method, ast.FunctionDef)
        and getattr(DiffusionGPUWorker, method.name) is getattr(Worker, method.name)
        for node in ast.walk(method)
    ]
    asked = {n.attr for n in nodes if isinstance(n, ast.Attribute) and is_of_the_runner(n)}
    own = set(dir(DiffusionModelRunner)) | set(DiffusionModelRunner.__annotations__)
    own |= {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(DiffusionModelRunner.__init__).lstrip()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    # An attribute that is new in vLLM has to be looked at.
    assert asked - own == NEVER_ASKED

    bound = set()
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", "")
        method = getattr(DiffusionModelRunner, name, None)
        if method is not None and is_of_the_runner(call.func):
            given = [one for one in call.args if not isinstance(one, ast.Starred)]
            named = {one.arg: one.value for one in call.keywords if one.arg is not None}
            inspect.signature(method).bind(None, *given, **named)
            bound.add(name)
    assert bound >= {"load_model", "profile_run", "initialize_kv_cache", "_dummy_run"}
