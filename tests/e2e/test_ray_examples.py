# SPDX-License-Identifier: Apache-2.0
"""The Ray examples on a cluster of two cores: a batch job whose processes die, and a server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.server import (
    CACHE_BYTES,
    ROOT,
    clean_environment,
    events,
    free_port,
    poll,
    tiny_llada,
)
from tests.engines import running_engine, sampling

#: The examples start a cluster of two cores.
pytestmark = pytest.mark.usefixtures("all_cores")

BATCH = ROOT / "examples" / "ray_batch.py"
SERVE = ROOT / "examples" / "ray_serve.py"
WORDS = (ROOT / "examples" / "words.txt").read_text(encoding="utf-8").split()

CONTEXT, MAX_TOKENS, BATCH_SIZE, NUM_GOOD, SEED = 512, 64, 4, 34, 5
ENGINE = {
    "dtype": "float32",
    "kv_cache_memory_bytes": CACHE_BYTES,
    "max_model_len": CONTEXT,
    "max_num_seqs": 8,
}
#: Bad input lines, and text that their errors must contain.
BAD_LINES = {
    '{"prompt": "a", "diffusion_keep_ratio": 7}': "diffusion_keep_ratio must be a number",
    json.dumps({"id": "long", "prompt": "a " * CONTEXT}): f"context length is {CONTEXT}",
    '{"prompt": "a", "max_tokens": "many"}': "max_tokens",
    '{"prompt": "a", "n": 2}': "'n' must be one of",
    '{"prompt": "a", "messages": []}': "must have one of prompt, prompt_token_ids, messages",
    "[1, 2": "not JSON",
}


def good_request(number: int) -> dict[str, Any]:
    """Return a request; one in three draws its tokens, and one in two has a seed."""
    words = " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(3 + number))
    request: dict[str, Any] = {
        "id": [number],
        "messages": [{"role": "user", "content": f" {words} copy"}],
        "diffusion_cache_policy": ("none", "dual", "sparse")[number % 3],
        "ignore_eos": True,
    }
    if number % 3 == 0:
        request["temperature"] = 0.8
    if number % 2 == 0:
        request["seed"] = 1000 + number
    return request


def lines() -> list[str]:
    """Return the job's input: good lines, with bad ones and a blank one among them."""
    result = [json.dumps(good_request(number)) for number in range(NUM_GOOD)]
    for place, bad in enumerate(BAD_LINES):
        result.insert(5 * place + 2, bad)
    result.insert(10, "")
    return result


# Processes.


@contextmanager
def cluster_folder() -> Iterator[str]:
    """Yield a folder for a cluster's files, by which the cluster's processes are identified.

    Its path is short, as paths of sockets must be. On exit, no process of the cluster may remain.
    """
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        yield folder
        poll(lambda: not processes(folder), "the cluster's processes to end")
    finally:
        for process in processes(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def processes(folder: str, title: str = "") -> list[psutil.Process]:
    """Return the processes of a folder's cluster whose command line contains ``title``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == folder and title in " ".join(
                process.cmdline()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def replicas(folder: str) -> set[int]:
    """Return the process ids of a job's replicas."""
    return {process.pid for process in processes(folder, "MapWorker")}


@contextmanager
def program(
    folder: str, log: Path, *command: str, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program with a cluster of its own; kill it on exit if it still runs."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**clean_environment(RAY_TMPDIR=folder, **environment), "RAY_ADDRESS": ""},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# The batch job.


@dataclass(frozen=True)
class Job:
    """A job that was killed, started again with one replica, lost it and continued with another.

    Attributes:
        command: Its command.
        output: Its output folder.
        batches_before: Number of batches finished when the first run was killed.
        num_batches: Number of all batches.
        printed: What both runs printed.
    """

    command: list[str]
    output: Path
    batches_before: int
    num_batches: int
    printed: str


def _wait_for_parts(process: subprocess.Popen[bytes], output: Path, number: int, log: Path) -> int:
    """Wait until at least ``number`` batches are finished; return how many are."""

    def parts() -> int:
        assert process.poll() is None, log.read_text()[-4000:]
        found = len(list(output.glob("part-*.jsonl")))
        return found if found >= number else 0

    return poll(parts, "a batch")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    given, output, log = folder / "input.jsonl", folder / "output", folder / "log"
    given.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    options = {
        "--batch-size": BATCH_SIZE,
        "--max-tokens": MAX_TOKENS,
        "--seed": SEED,
        "--engine-args": json.dumps(ENGINE),
    }
    command = [str(BATCH), str(given), str(output)]
    command += [str(word) for option in options.items() for word in option]
    num_batches = -(-(NUM_GOOD + len(BAD_LINES)) // BATCH_SIZE)

    with cluster_folder() as cluster, program(cluster, log, *command) as process:
        before = _wait_for_parts(process, output, 1, log)
        assert len(replicas(cluster)) == 2
        process.kill()
        process.wait()
    before = len(list(output.glob("part-*.jsonl")))
    # One replica now, so that only its successor can finish the job.
    with cluster_folder() as cluster, program(cluster, log, *command, "--replicas", "1") as process:
        done = _wait_for_parts(process, output, before + 1, log)
        assert done < num_batches
        (first,) = replicas(cluster)
        os.kill(first, signal.SIGKILL)
        poll(lambda: replicas(cluster) - {first}, "another replica")
        assert process.wait(timeout=900) == 0, log.read_text()[-4000:]
    return Job(command, output, before, num_batches, log.read_text())


@pytest.fixture(scope="module")
def results(job: Job) -> dict[int, dict[str, Any]]:
    """Return the job's results by line; each line must have one result, in order of lines."""
    found = [json.loads(text) for text in (job.output / "results.jsonl").read_text().splitlines()]
    wanted = [number for number, text in enumerate(lines(), start=1) if text]
    assert [result["line"] for result in found] == wanted
    return {result["line"]: result for result in found}


def test_the_job_was_disturbed_and_is_done(job: Job) -> None:
    assert 0 < job.batches_before < job.num_batches
    assert {path.name for path in job.output.iterdir()} == {"job.json", "lock", "results.jsonl"}


def test_bad_lines_are_told(results: dict[int, dict[str, Any]]) -> None:
    for line, text in enumerate(lines(), start=1):
        if text in BAD_LINES:
            assert BAD_LINES[text] in results[line]["error"]
            assert "token_ids" not in results[line]
    assert [r["id"] for r in results.values() if "error" in r and "id" in r] == ["long"]


def test_tokens_are_those_of_an_undisturbed_engine(results: dict[int, dict[str, Any]]) -> None:
    requests = {
        line: json.loads(text)
        for line, text in enumerate(lines(), start=1)
        if text and text not in BAD_LINES
    }
    params = [
        sampling(
            MAX_TOKENS,
            detokenize=True,
            temperature=request.get("temperature", 0.0),
            seed=request.get("seed", SEED + line),
            diffusion_cache_policy=request["diffusion_cache_policy"],
        )
        for line, request in requests.items()
    ]
    options = {**ENGINE, "max_num_seqs": 16, "skip_tokenizer_init": False}
    with running_engine(str(tiny_llada()), **options) as llm:
        messages = [request["messages"] for request in requests.values()]
        outputs = llm.chat(messages, params, use_tqdm=False)
    for (line, request), output in zip(requests.items(), outputs, strict=True):
        assert results[line] == {
            "line": line,
            "id": request["id"],
            "text": output.outputs[0].text,
            "token_ids": list(output.outputs[0].token_ids),
            "finish_reason": "length",
        }


def test_a_job_that_is_done_is_not_run_again(job: Job, tmp_path: Path) -> None:
    told = f"{NUM_GOOD} answered, {len(BAD_LINES)} failed (first: line 3)"
    assert told in job.printed
    content = (job.output / "results.jsonl").read_bytes()
    log = tmp_path / "log"
    with cluster_folder() as cluster, program(cluster, log, *job.command) as process:
        assert process.wait(timeout=600) == 0
        assert told in log.read_text()
        assert not Path(cluster, "ray").exists()
    assert (job.output / "results.jsonl").read_bytes() == content


def test_a_folder_of_another_job_is_refused(job: Job, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        cluster_folder() as cluster,
        program(cluster, log, *job.command, "--max-tokens", "8") as process,
    ):
        assert process.wait(timeout=600) == 1
    assert "is the output of another job: its defaults was" in log.read_text()


# The server.


@pytest.fixture(scope="module")
def served_from() -> Iterator[str]:
    """Yield the folder of the server's cluster."""
    with cluster_folder() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(served_from: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server with one replica."""
    log, port = tmp_path_factory.mktemp("serve") / "log", free_port()
    command = [str(SERVE), "--serve-port", str(port), "--max-replicas", "1", str(tiny_llada())]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "512"]
    command += ["--kv-cache-memory-bytes", str(CACHE_BYTES)]
    with (
        program(served_from, log, *command) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as connection,
    ):

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                return connection.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        poll(healthy, "the server to answer")
        yield connection
        # Not SIGINT, which programs started from a background job ignore.
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=600) == 0, log.read_text()[-4000:]


def complete(client: httpx.Client) -> httpx.Response:
    """Ask for a completion that the embedded model answers with `KNOWN`."""
    prompt = "<|startoftext|><|user|> file18 the42 name49 get name file<|eot_id|><|assistant|>"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 16}
    body["vllm_xargs"] = {"diffusion_cache_policy": "none"}
    return client.post("/v1/completions", json=body)


KNOWN = "name49 file18"


def test_serve_answers_a_completion(client: httpx.Client) -> None:
    assert complete(client).json()["choices"][0]["text"].strip() == KNOWN


def test_serve_streams_a_chat(client: httpx.Client) -> None:
    content = " default used [ file name object list ] method class given copy"
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "stream": True}
    body["vllm_xargs"] = {"diffusion_block_length": 2}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        deltas = [choice["delta"] for event in events(response) for choice in event["choices"]]
    pieces = [delta["content"] for delta in deltas if delta.get("content")]
    assert len(pieces) > 1
    assert "".join(pieces).strip() == "file name object list"


def test_serve_refuses_a_bad_parameter(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "a", "vllm_xargs": {"diffusion_keep_ratio": 7}}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]["message"]
    assert error == "diffusion_keep_ratio must be a number with 0 < r <= 1, got 7"


def test_serve_goes_on_after_the_death_of_an_engine(client: httpx.Client, served_from: str) -> None:
    """Must be the last test: the only replica loses its engine."""
    (engine,) = processes(served_from, "VLLM::EngineCore")
    engine.kill()
    engine.wait()

    def answered() -> httpx.Response | None:
        response = complete(client)
        return response if response.status_code == 200 else None

    assert poll(answered, "another replica").json()["choices"][0]["text"].strip() == KNOWN
    (another,) = processes(served_from, "VLLM::EngineCore")
    assert another.pid != engine.pid
