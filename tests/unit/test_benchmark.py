# SPDX-License-Identifier: Apache-2.0
"""The benchmark's options, kinds of steps, floors, and reports of programs that fail."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts import EXAMPLES, load
from vllm_sparse_dllm.models import cpu_products

breakdown, ceilings, programs, run = load(
    EXAMPLES / "benchmarks", "breakdown", "ceilings", "programs", "run"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--policies sparse,lru", "--policies: must be of none, prefix, dual, sparse, got lru"),
        ("--repeats 0", "--repeats: must be at least 1, got 0"),
        ("--prompts 512,0", "--prompts: must be at least 1, got 0"),
        ("--vanilla-steps -1", "--vanilla-steps: must be at least 0, got -1"),
        ("--keep-ratio nan", "--keep-ratio: must be above 0 and at most 1, got nan"),
        ("--thresholds 0.9,2", "--thresholds: must be above 0 and at most 1, got 2"),
        ("--block-length 0", "--block-length: must be at least 1, got 0"),
        ("--variant late", "--variant: needs NAME=JSON, got late"),
        ("--variant late=1", "--variant: needs NAME=JSON, got late=1"),
        ('--variant late={"delay":1}', "a request has no setting delay"),
        ('--variant late={"delay_steps":-1}', "delay_steps must be an integer from 0 to 65536"),
        ("--model /nowhere", "--model: needs the folder of a checkpoint, got /nowhere"),
        ("--only step", "--only chooses of the figures of --targets"),
        ("--sweeps context,all", "--sweeps must be of context, .* got all"),
        ("--response 48", "--response must be a multiple of the block length 32"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.parse_arguments(options.split())
    assert ended.value.code == 2
    (last,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(message, last), last


@pytest.mark.parametrize("in_float32", [True, None])
def test_products_are_measured_as_the_engine_multiplies(
    in_float32: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor without half-precision products, the engine's are those of float32 weights."""
    if in_float32 is not None:
        monkeypatch.setattr(cpu_products, "wants_float32_products", lambda dtype: in_float32)
    dtype, device = torch.bfloat16, torch.device("cpu")
    wide = cpu_products.wants_float32_products(dtype)
    shape = ceilings.ModelShape(width=32, kv_width=32, mlp=64, layers=1, vocab=64)
    rates = ceilings.measure(shape, dtype, [3], 1e-3, device)["gemm"]["3"]
    names = {"torch", "onednn, float32" if wide else "onednn"}
    assert rates["hot"].keys() == rates["walk"].keys() == names
    assert rates["rate"] > 0


def test_only_the_sweeps_that_run_need_positions() -> None:
    """A model with fewer positions than the longest default prompt can be measured."""
    for options, longest in (
        ("--sweeps context", 4096),
        ("--sweeps concurrency", 512),
        ("--sweeps concurrency,keep", 1024),
        ("--sweeps context --prompts 64,128", 128),
        ("--sweeps threshold", 1),
    ):
        arguments = run.parse_arguments(options.split())
        assert run._longest_prompt(arguments) == longest, options
    # The block lengths to sweep matter only if they are swept.
    assert run.parse_arguments("--sweeps context --response 32".split()).response == 32


def test_steps_on_a_cache_are_not_full_passes() -> None:
    """Under `prefix`, a step on a cache runs more than its block."""

    def step(*tokens: int) -> dict[str, Any]:
        parts = {"forward": 0.5, "other": 0.5}
        return {"tokens": list(tokens), "num_forwards": 1, "total": 1.0, "seconds": parts}

    steps = [step(24), step(16), step(24, 24), step(16, 16), step(8, 24), step(8, 8), step()]
    kinds = breakdown.break_down({"response": 16, "steps": steps})
    assert {kind: one.num_steps for kind, one in kinds.items()} == {
        "full": 1,
        "block": 2,
        "mixed": 1,
    }


def test_a_program_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llada", "architectures": ["Other"]}')
    program = programs.Program("baseline.py", [str(tmp_path)], tmp_path / "baseline.log")
    try:
        with pytest.raises(
            programs.ProgramError, match=r"not \['Other'\]; its log is .*baseline"
        ) as found:
            program.wait_until_ready()
        # The error includes the end of the log.
        assert "    raise ValueError(" in str(found.value)
    finally:
        program.stop()


def test_a_program_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    program = programs.Program("baseline.py", [str(tmp_path)], tmp_path / "baseline.log")
    with pytest.raises(programs.ProgramError, match="did not answer within 0 s and was ended"):
        program.wait_until_ready(0.0)
    assert program._process.returncode is not None
    program.stop()


def test_each_start_has_a_log_of_its_own(tmp_path: Path) -> None:
    for number in (1, 2):
        program = programs.Program("baseline.py", ["--help"], tmp_path / "baseline.log")
        with pytest.raises(programs.ProgramError, match=f"^baseline-{number} ended"):
            program.wait_until_ready()
        program.stop()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["baseline-1.log", "baseline-2.log"]


#: A program whose child outlives it.
FORKING = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from programs import serve

def load():
    child = os.fork()
    if child == 0:
        time.sleep(600)
    return {"child": child}, lambda job: os._exit(1)

serve(load)
"""


def test_a_forked_child_does_not_hide_that_a_program_ended(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    environment = {**os.environ, "BENCHMARK_REPLY_PIPE": str(write_end)}
    command = [sys.executable, "-c", FORKING, str(EXAMPLES / "benchmarks")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, pass_fds=(write_end,)
    ) as process:
        os.close(write_end)
        with os.fdopen(read_end, "r", encoding="utf-8") as replies:
            child = json.loads(replies.readline())["child"]
            try:
                process.communicate(b"{}\n", timeout=60)
                assert select.select([replies], [], [], 60.0)[0] and replies.read() == ""
            finally:
                os.kill(child, signal.SIGKILL)


def test_reasons_are_found_in_logs() -> None:
    log = """Loading
(EngineCore pid=12) ERROR 11-30 15:13:35 [core.py:953] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-30 15:13:35 [core.py:953]     raise ValueError(text)
(EngineCore pid=12) ERROR 11-30 15:13:35 [core.py:953] torch.OutOfMemoryError: CUDA out of memory
pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig
  Value error, no kernels here [type=value_error, input_value=1, input_type=int]
    For further information visit the documentation
"""
    found = programs.reasons(log + log)
    assert [line.partition(":")[0].partition(",")[0] for line in found] == [
        "torch.OutOfMemoryError",
        "pydantic_core._pydantic_core.ValidationError",
        "Value error",
    ]


def test_a_floor_is_by_the_rate_of_enough_rows() -> None:
    rates = {"bandwidth": 1e30, "gemm": {"32": {"rate": 1.0}, "256": {"rate": 8.0}}}
    rates["gemm"]["64"] = {"rate": 2.0}
    cost = ceilings.StepCost(linear=16.0, attention=8.0, weight_bytes=1.0, cache_bytes=1.0)
    for rows, linear in ((16, 16.0), (32, 16.0), (33, 8.0), (96, 2.0), (4096, 2.0)):
        floor = ceilings.floor_of(cost, rows, rates)
        # Shapes of attention's products do not depend on the rows, so the best rate of all counts.
        assert (floor.linear, floor.attention) == (linear, 1.0), rows


def test_a_ceiling_is_the_best_that_was_reached() -> None:
    def measured(bandwidth: float, **rates: float) -> dict[str, Any]:
        return {"bandwidth": bandwidth, "gemm": {rows: {"rate": r} for rows, r in rates.items()}}

    best = ceilings.best_of(measured(3.0, a=5.0, b=2.0), measured(4.0, a=1.0, b=7.0))
    assert best == measured(4.0, a=5.0, b=7.0)
