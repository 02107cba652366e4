# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's rounds, and what it does about failures and a lack of time or memory."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts import EXAMPLES, load

checkpoints, jobs, session, gpu, gpu_options, gpu_plans, gpu_record, programs = load(
    EXAMPLES / "benchmarks",
    *(
        "checkpoints",
        "jobs",
        "session",
        "gpu",
        "gpu_options",
        "gpu_plans",
        "gpu_record",
        "programs",
    ),
)
ProgramError, StartError = programs.ProgramError, programs.StartError


def test_a_card_must_be_there_and_its_torch_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cuda", "--output", str(tmp_path)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", print, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", print, raising=False)
    # On a GPU, other kernels must not silently replace the package's own.
    assert gpu_options.parse_arguments("", options).attention_backend == "triton"
    monkeypatch.delattr(torch.accelerator, "get_memory_info")
    with pytest.raises(SystemExit):
        gpu_options.parse_arguments("", options)
    assert "calls torch.accelerator.get_memory_info, which PyTorch" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_options.parse_arguments("", options)
    assert "argument --device: cuda needs a card" in capsys.readouterr().err


def benchmark_of(tmp_path: Path, options: str, budget: float = 1000.0) -> Any:
    line = f"--device cpu --size tiny --output {tmp_path} {options}".split()
    arguments = gpu_options.parse_arguments("", line)
    benchmark = gpu.GpuBenchmark(arguments, time.monotonic() + budget, tmp_path / "models")
    benchmark.ceilings = {"bandwidth": 1e12, "gemm": {"32": {"rate": 1e14}}}
    machine = {"name": "a CPU", "memory": None, "torch": "2", "python": "3"}
    about = {"family": "llada", "size": "tiny", "dtype": "float32", "machine": machine}
    about |= {"command": "gpu.py", "started": "today", "ceilings": None, "engines": []}
    benchmark.record.runs.append(about)
    return benchmark


def test_rows_of_all_passes_are_measured(tmp_path: Path) -> None:
    rows = benchmark_of(tmp_path, "--groups contexts,batches").planner.rows()
    # Blocks of 8; 2 blocks are a response under `prefix`, or a block and the previous one again.
    assert {8, 16, 3 * 8, 3 * 16, 32 + 16, 48 + 16, 3 * (48 + 16)} <= set(rows)
    assert rows == sorted(rows)


class PretendedSession(session.Session):  # type: ignore[misc, name-defined]
    """A session whose programs answer at once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.done: list[tuple[int, int]] = []
        self.most_jobs = 1 << 30

    def prepare(self, *names: str) -> None:
        pass

    def about(self) -> dict[str, Any]:
        kernels = {"attention": "None", "graphs": [1, 2]}
        about = {"start_seconds": 1.0, "vllm": "0", "memory": {"weights": 1, "pool": 1}}
        about |= {"kernels": kernels, "max_num_batched_tokens": 64, "page_size": 32}
        return {"engine": about}

    def run(self, program: str, job: dict[str, Any]) -> dict[str, Any]:
        if job["settings"].get("steps") != 4 and job["response"] == 16:
            if len(self.done) == self.most_jobs:
                raise KeyboardInterrupt
            self.done.append((len(job["prompts"][0]), len(job["prompts"])))
        return {"seconds": 1.0, "peak_memory": 1 << 30, "tokens": []}


def test_all_have_a_round_before_any_has_another_and_what_is_done_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = benchmark_of(
        tmp_path, "--groups contexts,batches --contenders sparse,dual --repeats 3"
    )
    pretended = PretendedSession(benchmark.model, benchmark.options, tmp_path, 64, 3)
    # Two contenders, four cases: the second round is interrupted in its second case.
    pretended.most_jobs = 2 * 4 + 3
    monkeypatch.setattr(benchmark, "_session", lambda *arguments: pretended)
    (plan,) = benchmark.planner.plans(None)
    with pytest.raises(KeyboardInterrupt):
        benchmark._measure_groups(plan)
    cases_in_order = [(32, 1), (48, 1), (32, 3), (48, 3)]
    assert pretended.done[::2][:5] == [*cases_in_order, (32, 1)]
    found = gpu_record.read(tmp_path / "gpu.json")
    assert [len(one.seconds) for one in found.measurements] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert [one.turn for one in found.measurements] == [1, 1, 2, 2, 3, 3, 4, 4]
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| 1 | contexts, batches | None | 1, 2 | 64 | 32 |" in text


def test_no_round_is_repeated_in_the_time_of_what_is_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = benchmark_of(tmp_path, "--groups contexts,memory --contenders sparse")
    pretended = PretendedSession(
        *(benchmark.model, benchmark.options, tmp_path, 64, 3, None, benchmark.deadline)
    )
    monkeypatch.setattr(benchmark, "_session", lambda *arguments: pretended)
    contexts, memory = benchmark.planner.plans(None)
    monkeypatch.setattr(benchmark, "_seconds_of", lambda plan: 1e6)
    benchmark._measure_groups(contexts, [memory])
    assert pretended.done == [(32, 1), (48, 1)]
    benchmark._measure_groups(memory)
    assert pretended.done[2:] == [(48, 1)] * 3
    (entry,) = gpu_record.read(tmp_path / "gpu.json").memory
    assert entry["peak"] == 1 << 30


def test_what_cannot_start_is_named(tmp_path: Path) -> None:
    # The pool has no room for the longest request.
    benchmark = benchmark_of(tmp_path / "pool", "--groups contexts --kv-cache-gib 0.000001")
    # The engine takes longer to start than the time left.
    late = benchmark_of(tmp_path / "time", "--groups contexts", budget=50.0)
    late._starts["engine"] = 90.0
    for one, why in (
        (benchmark, r"room for 0 pages, and the longest request needs \d"),
        (late, r"to start takes about 90 s of \d+ s left"),
    ):
        (plan,) = one.planner.plans(None)
        one._measure_groups(plan)
        (skipped,) = one.record.skipped
        assert skipped["what"] == "contexts" and re.search(why, skipped["why"])
        assert not list(one.arguments.output.glob("*.log"))


def test_many_requests_run_the_blocks_that_tell(tmp_path: Path) -> None:
    here = object.__new__(session.Session)
    here.model = checkpoints.configuration(
        tmp_path, "llada", checkpoints.SIZES["tiny"], "float32", 64
    )
    here.options = session.Options("bfloat16", 16, 4, 0.5, 3, 8, None, None, 8)

    def job_of(name: str, num: int, one_step: bool = False, **changes: int) -> tuple[Any, float]:
        settings = here.settings(name) | changes
        contender = session.Contender(name, "engine", settings, one_step=one_step)
        return here.job_of(contender, [[9]] * num, 16)

    for name in ("sparse", "none"):
        job, scale = job_of(name, 7)
        assert "canvas" not in job["settings"] and scale == (2 if name == "none" else 1)
    mask = checkpoints.mask_token_id(here.model)
    for name, changes, written, steps, scale in (
        ("sparse", {}, [0], None, 4),
        ("sparse", {"steps": 8}, [0], 2, 4),
        ("sparse", {"refresh_interval": 4}, [0, 1, 2, 3], None, 1),
        ("sparse", {"refresh_interval": 4, "steps": 8}, [0, 1, 2, 3], 8, 1),
        ("prefix", {}, [0, 3], None, 2),
        ("none", {}, [0], 2, 8),
        ("none", {"one_step": True}, [0], 1, 16),
    ):
        job, found = job_of(name, 8, **changes)
        canvas = job["settings"]["canvas"]
        assert found == scale and len(canvas) == 16 and job["response"] == 16
        assert [canvas[4 * index] == mask for index in range(4)] == [n in written for n in range(4)]
        assert job["settings"].get("steps") == steps, (name, changes)
    # A measured response is as long as the canvas, that of a warm-up is not.
    warm = jobs.warm_up(job)
    assert "canvas" not in warm["settings"]
    # Without a cache all requests warm up, otherwise a quarter of them.
    assert (len(warm["prompts"]), warm["settings"]["steps"]) == (8, 1)
    assert len(jobs.warm_up(job_of("sparse", 8)[0])["prompts"]) == 2


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_canvas_has_the_mask_of_the_public_models(family: str, tmp_path: Path) -> None:
    size = checkpoints.PUBLIC_SIZES[family]
    here = object.__new__(session.Session)
    here.model = checkpoints.configuration(tmp_path, family, size, "bfloat16", 8192)
    here.options = session.Options("bfloat16", 128, 32, 0.5, 3, 16, None, None, 8)
    config = json.loads((here.model / "config.json").read_text(encoding="utf-8"))
    for name in ("sparse", "none"):
        contender = session.Contender(name, "engine", here.settings(name))
        job, _ = here.job_of(contender, [[9]] * 8, 128)
        assert job["settings"]["canvas"][:32] == [config["mask_token_id"]] * 32


def test_a_canvas_that_is_not_written_is_no_measurement() -> None:
    job = {"settings": {"canvas": [5, 5, 8, 8]}}
    jobs.check_canvas(job, {"tokens": [[1, 2, 8, 8]]}, 5)
    with pytest.raises(ProgramError, match="its mask, 5, is among the tokens"):
        jobs.check_canvas(job, {"tokens": [[1, 2, 8, 8], [1, 5, 8, 8]]}, 5)
    with pytest.raises(ProgramError, match="it has no mask, 6"):
        jobs.check_canvas(job, {"tokens": [[1, 2, 8, 8]]}, 6)


class PretendedProgram:
    """A program that is ready at once, or fails with the error ``why``."""

    def __init__(self, name: str, why: str | None = None) -> None:
        self.name = name
        self.why = why
        self.stopped = False

    def wait_until_ready(self, limit: float = 0.0) -> dict[str, Any]:
        if self.why is not None:
            raise ProgramError(self.why)
        return {"start_seconds": 1.0}

    def stop(self) -> None:
        self.stopped = True


def session_of(tmp_path: Path, whys: list[str | None]) -> tuple[Any, list[PretendedProgram]]:
    """Return a session, and the programs it starts: the n-th fails with ``whys[n]``, if any."""
    model = checkpoints.configuration(tmp_path, "llada", checkpoints.SIZES["tiny"], "float32", 64)
    options = session.Options("float32", 16, 8, 0.5, 2, 8, None, None)
    here = session.Session(model, options, tmp_path, 64, 3)
    started: list[PretendedProgram] = []

    def start(name: str) -> PretendedProgram:
        started.append(PretendedProgram(name, whys.pop(0) if whys else None))
        return started[-1]

    here._start = start
    return here, started


def test_each_program_is_started_once(tmp_path: Path) -> None:
    here, started = session_of(tmp_path, [])
    here.prepare("engine", "engine", "baseline", "engine")
    here.prepare("engine")
    assert [one.name for one in started] == ["engine", "baseline"]


def test_what_fails_to_start_is_stopped_and_tried_once_more(tmp_path: Path) -> None:
    here, started = session_of(tmp_path, [None, "no room", "no room"])
    here.prepare("baseline")
    for why in ("no room", "no room", "engine is not started again"):
        with pytest.raises(StartError, match=why):
            here.prepare("engine")
        assert here.is_running("baseline") and not here.is_running("engine")
    assert [one.stopped for one in started] == [False, True, True]


class FailingSession(PretendedSession):
    """A session in which contenders with the ``failing`` policies fail."""

    failing: frozenset[str] = frozenset({"dual"})
    error: Exception = ProgramError("engine ended\nRuntimeError: no such kernel")

    def is_running(self, name: str) -> bool:
        return True

    def run(self, program: str, job: dict[str, Any]) -> dict[str, Any]:
        if job["settings"]["cache_policy"] in self.failing:
            raise self.error
        return super().run(program, job)


def failing_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, error: Exception | None = None
) -> Any:
    """Return a benchmark that has run with programs that fail under ``dual``."""
    benchmark = benchmark_of(tmp_path, f"--contenders sparse,dual --repeats 3 {options}")
    pretended = FailingSession(benchmark.model, benchmark.options, tmp_path, 64, 3)
    pretended.error = error or pretended.error
    monkeypatch.setattr(benchmark, "_session", lambda *arguments: pretended)
    for plan in benchmark.planner.plans(None):
        benchmark._measure_groups(plan)
    return benchmark


def test_a_contender_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = failing_run(tmp_path, monkeypatch, "--groups contexts,batches,memory")
    found = gpu_record.read(tmp_path / "gpu.json")
    cases_in_order = [(32, 1), (48, 1), (32, 3), (48, 3)]
    assert [(one.prompt, one.concurrency) for one in found.measurements] == cases_in_order
    assert {one.contender for one in found.measurements} == {"engine sparse"}
    # The turn in which it failed gets no more rounds; the others get theirs, without it.
    assert [len(one.seconds) for one in found.measurements] == [1, 3, 3, 3]
    assert len(found.memory) == 1
    first, *later = benchmark.record.skipped
    assert first["what"] == "contexts: context 32, 1 at once, engine dual"
    assert first["why"] == "engine ended ... RuntimeError: no such kernel"
    assert len(later) == 3 and all("it failed before: engine ended" in x["why"] for x in later)


def test_one_that_works_elsewhere_is_left_out_of_what_is_no_smaller(tmp_path: Path) -> None:
    benchmark = benchmark_of(tmp_path, "--groups contexts,batches --contenders dual")
    (plan,) = benchmark.planner.plans(None)
    (one,) = plan.contenders
    benchmark._failures[one.name] = gpu_plans.Failure(48, 1, "no room")
    assert not any(benchmark._works(turn, one) for turn in plan.turns)
    benchmark._measured.add(one.name)
    assert [benchmark._works(turn, one) for turn in plan.turns] == [True, False, True, False]


def test_a_restart_that_does_not_fit_is_no_contender_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = StartError("to start takes about 90 s of 50 s left")
    benchmark = failing_run(tmp_path, monkeypatch, "--groups contexts", error)
    assert [one["why"] for one in benchmark.record.skipped] == [str(error)] * 2
    assert not benchmark._failures and len(benchmark.record.measurements) == 2


def test_the_time_of_a_restart_is_counted(tmp_path: Path) -> None:
    benchmark = benchmark_of(tmp_path, "--groups contexts --contenders sparse", budget=50.0)
    benchmark._starts["engine"] = 90.0
    (plan,) = benchmark.planner.plans(None)
    here, _ = session_of(tmp_path, [])
    assert benchmark._affordable(here, plan.turns[0], plan.contenders) == []
    here.prepare("engine")
    assert benchmark._affordable(here, plan.turns[0], plan.contenders) == plan.contenders


def test_without_the_baseline_the_engine_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = benchmark_of(tmp_path, "--groups contexts,baseline --contenders sparse")
    pretended = PretendedSession(benchmark.model, benchmark.options, tmp_path, 64, 3)

    def prepare(*names: str) -> None:
        if "baseline" in names:
            raise StartError("baseline-1 ended\ntorch.OutOfMemoryError: CUDA out of memory")

    monkeypatch.setattr(pretended, "prepare", prepare)
    monkeypatch.setattr(benchmark, "_session", lambda *arguments: pretended)
    (plan,) = benchmark.planner.plans(None)
    benchmark._measure_groups(plan)
    (skipped,) = benchmark.record.skipped
    assert skipped["what"] == "contexts, baseline, baseline sparse, baseline dual, baseline none"
    assert "out of memory" in skipped["why"]
    assert [one.contender for one in benchmark.record.measurements] == ["engine sparse"] * 4


def test_a_contender_is_warm_in_the_program_that_runs(tmp_path: Path) -> None:
    """After another one's failure has ended the program, a contender warms up again."""
    here, started = session_of(tmp_path, [])
    ran: list[tuple[int, str, int]] = []

    def run(program: str, job: dict[str, Any]) -> dict[str, Any]:
        here.prepare(program)
        ran.append((len(started), job["settings"]["cache_policy"], job["response"]))
        if ran[-1][1:] == ("dual", 16):
            here.stop(program)
            raise ProgramError("ended")
        return {"seconds": 1.0, "peak_memory": 1, "tokens": []}

    here.run = run
    start = here._start

    def counted(name: str) -> PretendedProgram:
        here._num_starts[name] += 1
        program: PretendedProgram = start(name)
        return program

    here._start = counted
    names = ("dual", "sparse")
    contenders = [session.Contender(name, "engine", here.settings(name)) for name in names]
    workload = here.workload("contexts", contenders, [[9]])
    here.round(workload)
    assert ran == [
        (1, "dual", 8),
        (1, "sparse", 8),
        (1, "dual", 16),
        (2, "sparse", 8),
        (2, "sparse", 16),
    ]
    assert list(workload.failed) == [0]
    here.round(workload)
    assert ran[5:] == [(2, "sparse", 16)]


def test_more_than_a_step_without_a_cache_only_where_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = benchmark_of(tmp_path, "--groups batches --contenders none --vanilla-steps 8")
    (plan,) = benchmark.planner.plans(None)
    here, _ = session_of(tmp_path, [])
    here.prepare("engine")
    (one,) = benchmark._affordable(here, plan.turns[0], plan.contenders)
    assert not one.one_step and not benchmark.record.skipped
    monkeypatch.setattr(gpu, "_PART_OF_REST", 0.0)
    (one,) = benchmark._affordable(here, plan.turns[0], plan.contenders)
    assert one.one_step
    (skipped,) = benchmark.record.skipped
    assert skipped["what"].endswith("3 at once, engine none, more than a step of its block")


def test_a_failure_of_the_ceilings_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = benchmark_of(tmp_path, "--groups contexts")
    pretended = FailingSession(benchmark.model, benchmark.options, tmp_path, 64, 3)
    machine = {"name": "a card", "memory": 1 << 30, "torch": "2", "python": "3"}
    monkeypatch.setattr(pretended, "about", lambda: {"ceilings": machine})

    def run(program: str, job: dict[str, Any]) -> dict[str, Any]:
        raise pretended.error

    monkeypatch.setattr(pretended, "run", run)
    monkeypatch.setattr(benchmark, "_session", lambda *arguments: pretended)
    benchmark.ceilings = None
    assert benchmark._measure_machine()
    # Whatever else fails, plans need the size of the memory.
    assert benchmark._run["machine"] == machine and benchmark.ceilings is None
    (skipped,) = benchmark.record.skipped
    assert "machine's rates" in skipped["what"] and "no such kernel" in skipped["why"]


def test_without_the_machine_s_rates_all_else_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = benchmark_of(tmp_path, "--groups contexts,steps,memory --contenders sparse")
    benchmark.ceilings = None
    pretended = PretendedSession(benchmark.model, benchmark.options, tmp_path, 64, 3)
    monkeypatch.setattr(benchmark, "_session", lambda *arguments: pretended)
    for plan in benchmark.planner.plans(None):
        benchmark._measure_groups(plan)
    found = gpu_record.read(tmp_path / "gpu.json")
    assert [one.notes["floor"] for one in found.measurements] == [None, None]
    assert [one["weights"] for one in found.steps] == [None] * 3 and len(found.memory) == 1
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "no roofline was measured" in text


def test_what_does_not_fit_gets_no_room(tmp_path: Path) -> None:
    benchmark = benchmark_of(tmp_path, "--groups contexts,batches --contenders sparse,dual")
    planner = benchmark.planner
    (all_fit,) = planner.plans(None)
    assert all_fit.pages == all_fit.needed
    room = (all_fit.needed - 1) * planner.page_bytes / 2**30
    planner.arguments.kv_cache_gib = room
    (most,) = planner.plans(None)
    assert most.least <= most.pages < most.most < most.needed


def test_what_nothing_foresaw_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(benchmark: Any) -> None:
        benchmark.record.runs.append(benchmark_of(tmp_path, "").record.runs[0])
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(gpu.GpuBenchmark, "run", run)
    line = f"gpu.py --device cpu --size tiny --output {tmp_path}"
    monkeypatch.setattr("sys.argv", line.split())
    assert gpu.main() == 1
    assert "| 1 | the rest | ZeroDivisionError: by nothing |" in capsys.readouterr().out
    (skipped,) = gpu_record.read(tmp_path / "gpu.json").skipped
    assert skipped["what"] == "the rest"
