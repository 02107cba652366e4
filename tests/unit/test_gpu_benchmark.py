# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's arithmetic, targets, options and merging of runs, and its archive."""

from __future__ import annotations

import json
import math
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.scripts import EXAMPLES, load

bounds, ceilings, bundle, checkpoints, cases = load(
    EXAMPLES / "benchmarks", "bounds", "ceilings", "bundle", "checkpoints", "gpu_cases"
)
session, gpu, gpu_options, gpu_record, gpu_report, gpu_targets = load(
    EXAMPLES / "benchmarks",
    *("session", "gpu", "gpu_options", "gpu_record", "gpu_report", "gpu_targets"),
)

SHAPE = ceilings.ModelShape(width=8, kv_width=4, mlp=16, layers=3, vocab=32)
#: Weights of a layer: queries 64, keys and values 64, output 64, gate and up 256, down 128.
LAYER = 576
HEAD = 256
BLOCK, RESPONSE, PROMPT = 4, 8, 12
LENGTH = PROMPT + RESPONSE
WEIGHT_BYTES = 2 * (3 * LAYER + HEAD)
#: Bytes of a position in all layers: a key and a value of 2 bytes per number.
SLOT_BYTES = 2 * 2 * 3 * 4


def run_of(bandwidth: float, rate: float, settings: dict[str, Any], requests: int = 1) -> Any:
    """Return the roofline of responses on a machine with these rates."""
    here = SimpleNamespace(
        shape=SHAPE, options=SimpleNamespace(response=RESPONSE, dtype="bfloat16")
    )
    rates = {"bandwidth": bandwidth, "gemm": {"1": {"rate": rate}}}
    settings = {"block_length": BLOCK, "keep_ratio": 0.5} | settings
    return bounds.roofline(here, settings, PROMPT, requests, rates)


def test_sizes_are_those_of_the_published_checkpoints(tmp_path: Path) -> None:
    shapes = {
        family: ceilings.ModelShape.of(
            checkpoints.configuration(
                tmp_path, family, cases.size_of(family, "public"), "bfloat16", 40000
            )
        )
        for family in checkpoints.FAMILIES
    }
    # `weights` leaves out the embedding, of which a step reads a few rows. With it there are 8.02
    # and 7.62 billion, without norms and biases.
    assert shapes["llada"].weights + 4096 * 126464 == pytest.approx(8.015e9, rel=1e-3)
    assert shapes["dream"].weights + 3584 * 152064 == pytest.approx(7.615e9, rel=1e-3)
    (llada,) = tmp_path.glob("llada-*")
    config = json.loads((llada / "config.json").read_text(encoding="utf-8"))
    assert config["max_sequence_length"] == 40000 and config["mask_token_id"] == 126336


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"cache_policy": "none"}, (4, 0)),
        ({"cache_policy": "prefix"}, (1, 3)),
        ({"cache_policy": "dual"}, (1, 3)),
        ({"cache_policy": "sparse"}, (2, 2)),
        ({"cache_policy": "sparse", "delay_steps": 0}, (1, 3)),
        ({"cache_policy": "sparse", "delay_steps": 9}, (4, 0)),
    ],
)
def test_passes_of_a_block(settings: dict[str, Any], passes: tuple[int, int]) -> None:
    assert bounds.passes_of_block({"block_length": BLOCK} | settings) == passes


@pytest.mark.parametrize(
    ("settings", "num_passes", "cached"),
    [
        ({"cache_policy": "none"}, 8, 0),
        # The prefix of the second block is longer by a block.
        ({"cache_policy": "prefix"}, 8, 3 * 12 + 3 * 16),
        ({"cache_policy": "dual"}, 8, 6 * 16),
        ({"cache_policy": "sparse"}, 8, 4 * 8),
        ({"cache_policy": "sparse", "delay_steps": 0, "eviction_delay": 1}, 8, 2 * 16 + 4 * 8),
        # Of the keys that the refresh kept, a block's worth may be the second block's, which its
        # steps do not read; all its steps but the first read the finished block's keys instead.
        ({"cache_policy": "sparse", "refresh_interval": 2}, 8, 2 * 8 + 4 + 3 * 8),
        # Three steps a block.
        ({"cache_policy": "sparse", "steps": 6}, 6, 2 * 8),
        ({"cache_policy": "sparse", "refresh_interval": 2, "steps": 6}, 6, 8 + 4 + 2 * 8),
    ],
)
@pytest.mark.parametrize("requests", [1, 3])
def test_roofline_by_bandwidth(
    settings: dict[str, Any], num_passes: int, cached: int, requests: int
) -> None:
    """If arithmetic takes no time: weights in every pass, and the cached keys and values."""
    expected = num_passes * WEIGHT_BYTES + requests * cached * SLOT_BYTES
    assert run_of(1.0, math.inf, settings, requests).response == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"cache_policy": "none"}, 6),
        ({"cache_policy": "dual"}, 6),
        ({"cache_policy": "sparse", "delay_steps": 0}, 6),
        # The step that commits nothing is not skipped: it fills the cache.
        ({"cache_policy": "sparse"}, 8),
        ({"cache_policy": "dual", "steps": 4}, 4),
    ],
)
def test_dream_passes_over_a_step_that_commits_nothing(
    settings: dict[str, Any], count: int
) -> None:
    settings = {"block_length": BLOCK, "keep_ratio": 0.5} | settings
    passes = bounds.passes_of_response(settings, PROMPT, RESPONSE, "dream")
    assert sum(one.count for one in passes) == count


def operations(rows: int, last_rows: float, keys: int) -> float:
    """Return the operations of a pass; of the last layer, only keys and values are of all rows."""
    linear = 2 * rows * (2 * LAYER + 64) + 2 * last_rows * (LAYER - 64 + HEAD)
    return linear + 4 * 8 * keys * (2 * rows + last_rows)


def test_roofline_by_arithmetic() -> None:
    """If reading memory takes no time."""
    full = operations(LENGTH, BLOCK, LENGTH)
    none = run_of(math.inf, 1.0, {"cache_policy": "none"})
    assert none.full_pass == pytest.approx(full)
    assert (none.response, none.block_step) == (pytest.approx(8 * full), 0.0)
    step = operations(BLOCK, BLOCK / 2, 8 + BLOCK)
    sparse = run_of(math.inf, 1.0, {"cache_policy": "sparse"})
    assert sparse.block_step == pytest.approx(step)
    assert sparse.response == pytest.approx(4 * full + 4 * step)
    # A pass takes the longer of the two, not their sum.
    slow = run_of(WEIGHT_BYTES / (2 * full), 1.0, {"cache_policy": "none"})
    assert slow.response == pytest.approx(16 * full)


def test_pages() -> None:
    sparse = {"cache_policy": "sparse", "block_length": 32, "keep_ratio": 0.5}
    # int((1024 + 128 - 32) * 0.5) + 32 slots.
    assert cases.num_pages(sparse, 1024, 128, 16) == 592 // 16
    assert cases.num_pages({"cache_policy": "dual", "block_length": 32}, 1024, 128, 16) == 72
    assert cases.num_pages({"cache_policy": "none", "block_length": 32}, 1024, 128, 16) == 0
    assert cases.page_bytes(SHAPE, 16, 2) == 16 * SLOT_BYTES


def test_a_pool_holds_what_it_was_made_for() -> None:
    contenders = [
        session.Contender(name, "engine", {"cache_policy": name, "block_length": 32})
        for name in ("sparse", "dual", "none")
    ]
    dual = contenders[1]
    pages = cases.pool_pages([(dual.settings, 1024, 8)], 128, 1152, 16)
    assert cases.fitting(contenders, 1024, 8, 128, 16, pages) == contenders
    # `dual` needs 72 pages for each request, `sparse` 37.
    assert cases.fitting(contenders, 1024, 9, 128, 16, pages) == [contenders[0], contenders[2]]
    assert cases.fitting(contenders, 1024, 16, 128, 16, pages) == [contenders[2]]
    # Whatever is measured, the longest request of the engine fits.
    assert cases.pool_pages([], 128, 4096, 16) >= 4096 // 2 // 16


def run_about(name: str = "NVIDIA H100 80GB HBM3", size: str = "public", **more: Any) -> dict:
    machine = {"name": name, "torch": "2", "python": "3"}
    machine["capability"] = [8, 9] if name == "NVIDIA L4" else [9, 0]
    about = {"family": "llada", "size": size, "dtype": "bfloat16", "machine": machine}
    return about | {"command": "gpu.py", "started": "today", "ceilings": None} | more


def measurement(contender: str, prompt: int, requests: int, rate: float, turn: int = 1) -> Any:
    one = session.Measurement(
        "contexts", turn, contender, "engine", {"block_length": 32}, prompt, 128, requests,
        requests, 1.0,
    )  # fmt: skip
    one.seconds = [requests * 128 / rate]
    one.notes = {"run": 0, "floor": requests * 128 / (2 * rate), "beside": {}, "pages": 0}
    return one


def record(*measurements: Any, **more: Any) -> Any:
    return gpu_record.Record([run_about()], list(measurements), **more)


def held(one: Any) -> dict[str, tuple[float | None, bool | None]]:
    return {t.figure: (t.value, t.holds) for t in gpu_targets.check_targets(one)}


def test_targets() -> None:
    steps = {"run": 0, "prompt": 1024, "requests": 1, "block_step": 6e-3, "weights": 5e-3}
    memory = {"run": 0, "prompt": 8192, "contender": "engine sparse"}
    memory |= {"weights": 15 << 30, "pool": 2 << 30, "peak": 23 << 30}
    found = held(
        record(
            measurement("engine sparse", 1024, 1, 119.0),
            measurement("engine late 4", 1024, 1, 121.0),
            measurement("engine sparse", 4096, 1, 30.0, turn=2),
            measurement("engine none", 4096, 1, 2.0, turn=2),
            # Measurements of different turns are not compared.
            measurement("engine sparse", 8192, 1, 30.0, turn=3),
            measurement("engine none", 8192, 1, 1.0, turn=4),
            measurement("engine sparse", 1024, 32, 1000.0, turn=5),
            steps=[steps],
            memory=[memory],
        )
    )
    one = "LLaDA-8B, one request, context"
    assert found[f"{one} 1,024, sparse: tokens/s"] == (pytest.approx(119), False)
    assert found[f"{one} 1,024, late 4: tokens/s"] == (pytest.approx(121), True)
    assert found[f"{one} 4,096: sparse over none"] == (pytest.approx(15), True)
    assert found[f"{one} 8,192: sparse over none"] == (None, None)
    many = "LLaDA-8B, 32 requests, context 1,024, sparse: tokens/s"
    assert found[many] == (pytest.approx(1000), False)
    (step,) = (value for figure, value in found.items() if "block step" in figure)
    assert step == (pytest.approx(1.2), True)
    (peak,) = (value for figure, value in found.items() if "peak memory" in figure)
    assert peak == (8.0, False)


@pytest.mark.parametrize("about", [{"name": "NVIDIA L4"}, {"size": "tiny"}])
def test_only_the_card_and_the_model_of_the_targets_are_judged(about: dict[str, str]) -> None:
    context = cases.SCALES[about.get("size", "public")].short
    one = record(measurement("engine sparse", context, 1, 200.0))
    one.runs = [run_about(**about)]
    targets = gpu_targets.check_targets(one)
    assert [t.value for t in targets if t.value is not None] == [pytest.approx(200)]
    assert all(t.holds is None for t in targets)
    text = gpu_report.markdown(one)
    assert "not judged" in text and "**no**" not in text


@pytest.mark.parametrize(
    ("name", "judged"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", False),
        ("NVIDIA H100 PCIe", False),
        ("NVIDIA H100 NVL", False),
    ],
)
def test_rates_are_judged_on_one_card_and_all_else_on_its_kind(name: str, judged: bool) -> None:
    steps = {"run": 0, "prompt": 1024, "requests": 1, "block_step": 6e-3, "weights": 5e-3}
    one = record(
        measurement("engine sparse", 1024, 1, 200.0),
        measurement(f"engine {cases.FEWER_STEPS}", 1024, 32, 3000.0),
        steps=[steps],
    )
    one.runs = [run_about(name, ceilings={"bandwidth": 3e12, "bandwidths": {}, "gemm": {}})]
    rate, fewer, step = (t for t in gpu_targets.check_targets(one) if t.value is not None)
    assert (rate.holds, step.holds) == (True if judged else None, True)
    # A figure that no target asks for is shown, but not judged.
    assert fewer.holds is None and "roofline allows 6,000" in fewer.note
    assert "by the nominal bandwidth" in step.note and "the measured 3,000" in step.note


@pytest.mark.parametrize(
    ("floor", "why"),
    [
        (1.001, "faster than the roofline, so not what it was to be"),
        (None, "no roofline was measured"),
    ],
)
def test_what_the_roofline_does_not_bear_out_is_not_judged(floor: float | None, why: str) -> None:
    fast = measurement("engine sparse", 1024, 1, 200.0)
    sparse, none = (
        measurement(f"engine {x}", 4096, 1, y) for x, y in (("sparse", 30), ("none", 1))
    )
    sparse.turn = none.turn = 2
    for one in (fast, none):
        one.notes["floor"] = floor and floor * min(one.seconds)
    steps = {"run": 0, "prompt": 1024, "requests": 1, "block_step": 6e-3}
    steps |= {"weights": floor and 5e-3, "block_step_floor": floor and 7e-3, "full_pass": 0.1}
    found = record(fast, sparse, none, steps=[steps | {"full_pass_floor": floor}])
    targets = [t for t in gpu_targets.check_targets(found) if t.value is not None]
    assert len(targets) == (2 if floor is None else 3)
    for target in targets:
        assert target.holds is None and why in target.note
    assert ("(impossible)" in gpu_report.markdown(found)) == (floor is not None)


def test_of_several_figures_the_one_that_is_for_it_counts() -> None:
    def one(rate: float, sweep: str = "contexts", run: int = 0, rounds: int = 3) -> Any:
        found = measurement("engine sparse", 1024, 1, rate)
        found.sweep, found.seconds = sweep, found.seconds * rounds
        found.notes["run"] = run
        return found

    def value(*ones: Any) -> float | None:
        several = record(*ones)
        several.runs = [run_about(started="2026-01-01 10:00:00"), run_about(started="2026")]
        return held(several)["LLaDA-8B, one request, context 1,024, sparse: tokens/s"][0]

    # Measured beside the baseline, in fewer rounds, or in an earlier run.
    for other in (one(9.0, sweep="baseline"), one(9.0, rounds=2), one(9.0, run=1)):
        for several in ((one(5.0), other), (other, one(5.0))):
            assert value(*several) == pytest.approx(5.0)


def test_nothing_was_measured() -> None:
    targets = gpu_targets.check_targets(gpu_record.Record())
    assert targets and all(t.value is None and t.holds is None for t in targets)
    assert "not measured" in gpu_report.markdown(gpu_record.Record())


def test_merge(tmp_path: Path) -> None:
    first = record(
        measurement("engine sparse", 1024, 1, 100.0),
        measurement("engine none", 1024, 1, 10.0),
        skipped=[{"run": 0, "what": "long", "why": "time"}],
    )
    second = record(
        measurement("engine sparse", 1024, 1, 130.0), measurement("engine none", 1024, 1, 26.0)
    )
    second.runs = [run_about(command="gpu.py --again")]
    records = []
    for number, one in enumerate((first, second)):
        records.append(gpu_record.read(gpu_report.write(tmp_path / str(number), one)[0]))
    # The same record again is not added twice.
    records.append(gpu_record.read(tmp_path / "1" / "gpu.json"))
    merged = gpu_record.merge(records)
    assert [run["command"] for run in merged.runs] == ["gpu.py", "gpu.py --again"]
    assert [one.notes["run"] for one in merged.measurements] == [0, 0, 1, 1]
    assert merged.skipped == first.skipped
    # Only measurements of the same turn and run share a turn.
    ratios = [
        one.speed_up(gpu_record.find(merged.measurements, one, "engine none"))
        for one in merged.measurements[::2]
    ]
    assert ratios == [pytest.approx(10), pytest.approx(5)]
    # The latest measurement counts.
    assert held(merged)["LLaDA-8B, one request, context 1,024, sparse: tokens/s"] == (
        pytest.approx(130),
        True,
    )
    # Reading gives back what was written.
    again = gpu_record.read(gpu_report.write(tmp_path / "merged", merged)[0])
    assert again.as_json() == merged.as_json()


def test_steps_are_told_apart_by_their_number() -> None:
    """Two runs with equally many refreshes give the times of a block step and a full pass."""
    benchmark = object.__new__(gpu.GpuBenchmark)
    benchmark.scale, benchmark.element_bytes = gpu.SCALES["public"], 2
    benchmark.ceilings = {"bandwidth": 1e12, "gemm": {"32": {"rate": 1e14}}}
    options = session.Options("bfloat16", 128, 32, 0.5, 3, 16, None, None)
    here: Any = object.__new__(session.Session)
    here.shape, here.options = SHAPE, options
    many, few = (
        session.Measurement(
            "steps",
            1,
            one.name,
            "engine",
            one.settings,
            1024,
            128,
            1,
            1,
            1.0,
            # 4 blocks, each with 2 full passes of 0.25 s and block steps of 0.01 s.
            seconds=[4 * (2 * 0.25 + (one.settings["steps"] // 4 - 2) * 0.01)],
        )
        for one in cases.steps_contenders(here)
    )
    times = benchmark._step_times(here, [many, few])
    assert times["block_step"] == pytest.approx(0.01)
    assert times["full_pass"] == pytest.approx(0.25)
    assert times["weights"] == pytest.approx(WEIGHT_BYTES / 1e12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--groups all", "--groups: must be of contexts, .*, memory, got all"),
        ("--groups batches --batches 1", "--batches: for --groups batches one must be above 1"),
        ("--batches 8,0", "--batches: must be at least 1, got 0"),
        ("--contexts 1024,-5", "--contexts: must be at least 1, got -5"),
        ("--contenders lru", "--contenders: must be of sparse, .* got lru"),
        ("--repeats 0", "--repeats: must be at least 1, got 0"),
        ("--vanilla-steps -3", "--vanilla-steps: must be at least 0, got -3"),
        ("--budget -1", "--budget: must be a number above 0, got -1"),
        ("--ceilings long", "--ceilings: must be a number above 0, got long"),
        ("--kv-cache-gib nan", "--kv-cache-gib: must be a number above 0, got nan"),
        ("--attention-backend fa4", "--attention-backend: invalid choice: 'fa4'"),
        ("--options [1]", r"--options: must be a JSON object .* got \[1\]"),
        ("--merge nowhere.json", "--merge: must be gpu.json files .* got nowhere.json: No such"),
        ("--output {full}", "--output: must be a folder without results, and .* has a gpu.json"),
        ("--merge {full}/gpu.json", "--merge: must be gpu.json files .* JSONDecodeError"),
        ("--output {full}/gpu.json", "--output: must be a folder, got the file"),
    ],
)
def test_bad_options_are_refused_before_anything_starts(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu.json").write_text("{", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        gpu_options.parse_arguments("", options.format(full=tmp_path).split())
    assert ended.value.code == 2
    (last,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(message, last), last


def test_the_last_output_counts(tmp_path: Path) -> None:
    """The archive's script passes one ahead of the user's options."""
    (tmp_path / "gpu.json").write_text("{", encoding="utf-8")
    line = ["--device", "cpu", "--output", str(tmp_path), "--output", str(tmp_path / "new")]
    assert gpu_options.parse_arguments("", line).output == tmp_path / "new"


def test_own_options_leave_the_others_as_they_are(tmp_path: Path) -> None:
    own = {"additional_config": {"sparse_dllm": {"delay_steps": 0}}, "block_size": 64}
    own["compilation_config"] = {"mode": 0}
    line = ["--device", "cpu", "--output", str(tmp_path), "--options", json.dumps(own)]
    line += ["--native-ops", "--attention-backend", "triton"]
    options = gpu_options.engine_options(gpu_options.parse_arguments("", line), 16)
    assert options["additional_config"]["sparse_dllm"] == {
        "attention_backend": "triton",
        "delay_steps": 0,
    }
    assert options["compilation_config"] == {"custom_ops": ["none"], "mode": 0}
    assert options["block_size"] == 64 and options["load_format"] == "dummy"


def test_names_of_a_machine(tmp_path: Path) -> None:
    file = tmp_path / "present.txt"
    file.write_text("Torch, pydantic_core\nregex\n", encoding="utf-8")
    assert bundle.read_names(file) == {"torch", "pydantic-core", "regex"}
    found = bundle.required_by(["transformers"])
    assert {"transformers", "tokenizers", "huggingface-hub", "numpy"} <= found
    assert "vllm" not in found
    assert not set(map(bundle.canonical, bundle.NEEDED)) & {"torch", "triton", "transformers"}


def test_what_travels_is_installed_and_needed() -> None:
    travelling = bundle.missing(set(bundle.PRESENT))
    assert {bundle.canonical(name) for name in bundle.NEEDED} <= set(travelling)
    # Their requirements travel too.
    assert "pydantic-core" in travelling and not set(travelling) & set(bundle.PRESENT)
    assert not set(bundle.missing({*bundle.PRESENT, "pydantic-core"})) & {"pydantic-core"}
    for name in travelling:
        assert bundle.installed_files(name), name
    with pytest.raises(bundle.BundleError, match="no-such-package is not installed"):
        bundle.installed_files("no-such-package")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--python banana", "--python: must be 3.11 or newer, as 3.12, got banana"),
        ("--python 3.9", "--python: must be 3.11 or newer"),
        ("--output x.tgz", "--output: must end in one of .tar.xz, .tar.gz, .tar.bz2, .tar, got"),
        ("--present nowhere", "--present: must be a file of names, got nowhere: No such file"),
    ],
)
def test_bad_options_of_the_archive(
    options: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["bundle.py", *options.split()])
    with pytest.raises(SystemExit):
        bundle.main()
    (last,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(message, last), last


def test_run_script_is_valid() -> None:
    done = subprocess.run(["bash", "-n"], input=bundle._RUN.encode(), check=False)
    assert done.returncode == 0
