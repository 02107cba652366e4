# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with vLLM's multi-process engine, and other programs in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.warm import WarmProgram

ROOT = Path(__file__).parents[2]
CACHE_BYTES = 64 << 20
#: Limits of polling; a passing test polls far less.
POLLS, POLL_SECONDS = 9000, 0.1


def tiny_llada() -> Path:
    """Return the embedded checkpoint's directory."""
    spec = importlib.util.find_spec("vllm_sparse_dllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "assets" / "tiny-llada"


def clean_environment(**extra: str) -> dict[str, str]:
    """Return the environment without the variables that tests set for engines in their process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return {**kept, "OMP_WAIT_POLICY": "PASSIVE", **extra}


def run_program(
    command: list[str], timeout: float = 900, environment: dict[str, str] | None = None
) -> str:
    """Run a program from the root of this checkout; it must exit with status 0.

    Args:
        command: The program and its arguments.
        timeout: Seconds that it may take.
        environment: Its environment, `clean_environment` by default.

    Returns:
        Its standard output and standard error.
    """
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment or clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def run_warm(arguments: list[str], output: Path, timeout: float = 900, **environment: str) -> str:
    """Run ``python ARGUMENTS`` as `run_program` does, without the time for importing vLLM.

    Args:
        arguments: The arguments of Python.
        output: File for the program's standard output and standard error.
        timeout: Seconds that it may take.
        **environment: Variables in addition to those of `clean_environment`.

    Returns:
        The content of ``output``.
    """
    given = clean_environment(**environment)
    program = WarmProgram(arguments, output=output, environment=given, folder=ROOT)
    try:
        status = program.wait(timeout)
    finally:
        program.kill()
    assert status == 0, output.read_text()[-6000:]
    return output.read_text()


def poll(condition: Callable[[], Any], what: str) -> Any:
    """Call ``condition`` until its value is true, and return the value.

    Raises:
        TimeoutError: If it stays false for all polls.
    """
    for _ in range(POLLS):
        value = condition()
        if value:
            return value
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"waited in vain for {what}")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server.

    Attributes:
        client: HTTP client with the server's address.
        log: File with all that the server prints.
    """

    def __init__(
        self, process: subprocess.Popen[bytes] | WarmProgram, port: int, log: Path
    ) -> None:
        self.process = process
        self.log = log
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def healthy(self) -> bool:
        """Return whether the server answers.

        Raises:
            RuntimeError: If its process has ended.
        """
        if self.process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{self.log.read_text()[-4000:]}")
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Send a request to ``/v1/<path>``."""
        return self.client.post(f"/v1/{path}", json={"model": "tiny", **body})

    def answer(self, path: str, **body: Any) -> dict[str, Any]:
        """Send a request that must succeed, return the answer."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    @contextmanager
    def streamed(self, path: str, **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Send a streamed request; the connection is closed on leaving."""
        content = {"model": "tiny", "stream": True, **body}
        with self.client.stream("POST", f"/v1/{path}", json=content) as response:
            if response.status_code != 200:
                response.read()
                raise AssertionError(response.text)
            yield events(response)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Return the processes that the server has started, those whose command line has a text."""
        if isinstance(self.process, WarmProgram):
            started = self.process.processes()
        else:
            started = psutil.Process(self.process.pid).children(recursive=True)
        return [own for own in started if title in "".join(own.cmdline())] if title else started

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of those of a metric's series that have the labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            match = re.fullmatch(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)", line)
            if match and all(f'{k}="{v}"' in (match[1] or "") for k, v in labels.items()):
                total += float(match[2])
        return total

    def gauges(self) -> tuple[float, float, float]:
        """Return running requests, waiting requests and the share of pages in use."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        running, waiting, usage = (self.metric(f"vllm:{name}") for name in names)
        return running, waiting, usage

    def stop(self) -> int:
        """Stop the server with SIGTERM, as a service manager does; return its exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a streamed answer; the last line must be ``[DONE]``."""
    for line in response.iter_lines():
        if not line:
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        yield json.loads(data)
    raise AssertionError("the stream ended without [DONE]")


def launch(
    log: Path,
    port: int,
    model: str | Path,
    *options: str,
    cold: bool = False,
    **environment: str,
) -> Server:
    """Start a server in float32, without waiting for it.

    Args:
        log: File for the server's output.
        port: The port to listen on.
        model: The checkpoint.
        *options: More options of ``vllm serve``.
        cold: Start a new process, parent of the server's other ones, instead of a warm program.
            Needed if its environment affects imports.
        **environment: Variables in addition to those of `clean_environment`.
    """
    arguments = [
        *("-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", "tiny"),
        *("--dtype", "float32"),
        *("--kv-cache-memory-bytes", str(CACHE_BYTES)),
        *options,
    ]
    given = clean_environment(**environment)
    if not cold:
        warm = WarmProgram(arguments, output=log, environment=given, folder=ROOT)
        return Server(warm, port, log)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=given,
            cwd=ROOT,
        )
    return Server(process, port, log)


def start(
    log: Path, model: str | Path, *options: str, cold: bool = False, **environment: str
) -> Server:
    """Start a server as `launch` does and wait until it answers."""
    server = launch(log, free_port(), model, *options, cold=cold, **environment)
    try:
        poll(server.healthy, "the server to answer")
    except BaseException:
        server.stop()
        raise
    return server


@contextmanager
def running_server(log: Path, model: str | Path, *options: str) -> Iterator[Server]:
    """Run a warm server in float32; stopped at the end, it must exit with status 0."""
    server = start(log, model, *options)
    try:
        yield server
    finally:
        status = server.stop()
    assert status == 0, f"exit status {status}:\n{log.read_text()[-4000:]}"
