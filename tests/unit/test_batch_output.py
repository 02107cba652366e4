# SPDX-License-Identifier: Apache-2.0
"""The batch job's requests and its output folder, without Ray or an engine."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scripts import EXAMPLES, load

(ray_batch,) = load(EXAMPLES, "ray_batch")
JOB = {"input": "digest", "model": None}


def result(line: int) -> str:
    return json.dumps({"line": line, "text": f"answer {line}"})


def test_a_job_goes_on_with_what_was_kept(tmp_path: Path) -> None:
    first = ray_batch.Output(tmp_path, JOB)
    first.add([4, 5], [result(4), result(5)])
    # What a crash in the middle of a write leaves.
    (tmp_path / "part-000000001.partial").write_text('{"line": 1, "te')
    del first
    second = ray_batch.Output(tmp_path, JOB)
    assert second.results == {4: result(4), 5: result(5)}
    second.add([1], [result(1)])
    second.add([4, 5], [result(4), result(5)])
    second.finish()
    assert second.complete
    text = (tmp_path / "results.jsonl").read_text()
    assert text.splitlines() == [result(1), result(4), result(5)]
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", "lock", "results.jsonl"}
    del second
    assert ray_batch.Output(tmp_path, JOB).results.keys() == {1, 4, 5}


def test_an_end_between_the_results_and_the_parts(tmp_path: Path) -> None:
    first = ray_batch.Output(tmp_path, JOB)
    first.add([1], [result(1)])
    kept = (tmp_path / "part-000000001.jsonl").read_bytes()
    first.finish()
    (tmp_path / "part-000000001.jsonl").write_bytes(kept)
    del first
    assert ray_batch.Output(tmp_path, JOB).results == {1: result(1)}
    assert {path.name for path in tmp_path.iterdir()} == {"job.json", "lock", "results.jsonl"}


@pytest.mark.parametrize("text", ['{"line": 1, "te', "", "5", "{}", '{"line": "x"}'])
@pytest.mark.parametrize("name", ["part-000000001.jsonl", "results.jsonl"])
def test_damaged_results_are_told(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"{result(1)}\n{text}\n")
    with pytest.raises(SystemExit, match=f"{name} is damaged"):
        ray_batch.Output(tmp_path, JOB)


@pytest.mark.parametrize("text", ['{"inp', "[]", "5", "[1]"])
def test_a_damaged_job_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(SystemExit, match=r"job.json is damaged|is the output of another job"):
        ray_batch.Output(tmp_path, JOB)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "0"], "--replicas must be at least 1, got 0"),
        (["--num-gpus", "-1"], "--num-gpus must be at least 0, got -1"),
        (["--num-cpus", "nan"], "--num-cpus must be at least 0, got nan"),
        (["--seed", "-5"], "--seed must be at least 0, got -5"),
        (["--engine-args", "[]"], "--engine-args must be an object"),
    ],
)
def test_arguments_are_checked(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = tmp_path / "input.jsonl"
    given.touch()
    for output, *more in (["out", *arguments], [str(given)]):
        monkeypatch.setattr("sys.argv", ["ray_batch.py", str(given), output, *more])
        with pytest.raises(SystemExit):
            ray_batch.parse_arguments()
        assert (message if more else f"{given} is no folder") in capsys.readouterr().err


def test_a_folder_is_of_one_process(tmp_path: Path) -> None:
    output = ray_batch.Output(tmp_path, JOB)
    with pytest.raises(SystemExit, match="another process is at work in"):
        ray_batch.Output(tmp_path, JOB)
    assert not output.complete


def test_a_folder_is_of_one_job(tmp_path: Path) -> None:
    ray_batch.Output(tmp_path, JOB)
    with pytest.raises(SystemExit, match="its model was None and now is 'other'"):
        ray_batch.Output(tmp_path, {**JOB, "model": "other"})


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(b'{"a"\r\n\n  \n\xff\nlast')
    assert ray_batch.read_requests(path) == {1: b'{"a"\r', 4: b"\xff", 5: b"last"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "a request must be an object, got list"),
        (b"{}", "a request must have one of prompt, prompt_token_ids, messages"),
        (b'{"prompt": "a", "model": "b"}', "'model' must be one of"),
        (b'{"prompt_token_ids": null}', "a request must have one of prompt"),
        (b'{"prompt": "a", "messages": [{"role": "user"}]}', "a request must have one of prompt"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": 5}', "prompt must be a text, got 5"),
        (b'{"prompt": "\\ud800"}', r"prompt must be valid Unicode, got '\\ud800'"),
        (b'{"prompt_token_ids": "abc"}', "prompt_token_ids must be a list of integers, got 'abc'"),
        (b'{"prompt_token_ids": [1, true]}', r"prompt_token_ids must be .*, got \[1, True\]"),
        (b'{"messages": []}', r"messages must be a list of at least one object, got \[\]"),
        (b'{"messages": {"role": "user"}}', "messages must be a list of at least one object"),
        (b'{"messages": [{"content": "a"}]}', "messages must be an object with a role, got {'con"),
        (b'{"messages": [[{"role": "user"}]]}', "messages must be an object with a role, got \\["),
    ],
)
def test_refused(text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ray_batch.parse(text)


def test_null_counts_as_left_out() -> None:
    text = (
        b'{"id": null, "prompt": "a", "messages": null, "seed": null, "diffusion_threshold": null}'
    )
    assert ray_batch.parse(text) == {"id": None, "prompt": "a", "diffusion_threshold": None}


def test_whatever_a_request_raises_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = ray_batch.Replica.__new__(ray_batch.Replica)
    replica._defaults = {"max_tokens": 7, "temperature": 0.0, "seed": 0}
    errors = iter([KeyError("role"), AssertionError()])

    def enqueue(request: Any, params: Any) -> str:
        if request["prompt"] == "bad":
            raise next(errors)
        return "0"

    monkeypatch.setattr(replica, "_enqueue", enqueue)
    texts = (b'{"prompt": "bad", "id": 5}', b'{"prompt": "bad"}', b'{"prompt": "good"}')
    batch, running = ray_batch.Batch(dict(enumerate(texts, start=1))), {}
    replica._admit(batch, running)
    assert running == {"0": (batch, 3)}
    batch.answer(3, {"text": ""})
    assert [json.loads(text) for text in batch.answered.result(0)] == [
        {"line": 1, "id": 5, "error": "'role'"},
        {"line": 2, "error": "AssertionError"},
        {"line": 3, "text": ""},
    ]


def test_a_broken_engine_leaves_no_batch_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = ray_batch.Replica.__new__(ray_batch.Replica)
    replica._inbox, replica._ready = queue.SimpleQueue(), Future()
    replica._model, replica._engine, replica._defaults = "model", {}, {"seed": 0}
    monkeypatch.setattr("vllm.LLM", lambda *args, **kwargs: None)

    def admit(batch: Any, batches: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(replica, "_admit", admit)
    threading.Thread(target=replica._run, daemon=True).start()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            replica._inbox.put(batch := ray_batch.Batch({1: b"{}"}))
            batch.answered.result(60)


@given(st.binary())
def test_any_line_is_a_request_or_an_error(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(ray_batch.parse(text), dict)


def test_sampling() -> None:
    defaults = {"max_tokens": 7, "temperature": 0.0, "seed": 100}
    own = ray_batch.sampling({"prompt": "a", "id": 1, "logit_bias": {"3": 1.5}}, defaults, 5)
    assert (own.max_tokens, own.temperature, own.seed) == (7, 0.0, 105)
    assert own.logit_bias == {3: 1.5}
    assert own.extra_args is None
    other = ray_batch.sampling({"seed": 1, "max_tokens": 9, "diffusion_steps": 3}, defaults, 5)
    assert (other.max_tokens, other.seed, other.extra_args) == (9, 1, {"diffusion_steps": 3})
    # To vLLM -1 means no seed, so that every run would draw differently.
    assert ray_batch.sampling({"seed": -1}, defaults, 5).seed == 105
    with pytest.raises(ValueError, match=r"Expected `int | null`, got `str`.*max_tokens"):
        ray_batch.sampling({"max_tokens": "many"}, defaults, 5)
