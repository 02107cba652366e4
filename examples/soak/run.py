# SPDX-License-Identifier: Apache-2.0
"""Put a server of the embedded model under random load, good and bad, and judge its behaviour.

Clients send requests over the whole API surface; some vanish, some read slowly, some send requests
that must be refused. Afterwards every good answer is compared with the one that `LLM` gives for
the same parameters in float32. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import traffic  # noqa: E402
from clients import Outcome, carry_out  # noqa: E402
from traffic import Plan  # noqa: E402

from tests.e2e.server import (  # noqa: E402
    Server,
    clean_environment,
    poll,
    running_server,
    tiny_llada,
)

#: Fewer sequences and pages than the clients need, so that requests wait for both.
SERVER_OPTIONS = ("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(40 << 20))
#: Memory counts as flat if the last third's peak is at most this many times the second third's.
MEMORY_BOUND = 1.1
#: With fewer requests, memory is not judged: the server may still load or compile things once.
WARM_UP_REQUESTS = 1000
#: Tolerance between float32 log-probabilities computed in different batches.
LOGPROB_TOLERANCE = 1e-3
SHOWN_FAILURES = 20
#: The request whose answer must be the same before and after the load.
PROBE = {"prompt": list(range(50, 90)), "max_tokens": 40, "return_token_ids": True}


class Memory:
    """Resident memory of a process and its descendants, sampled during a run.

    Attributes:
        samples: Pairs of requests done so far and bytes.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.samples: list[tuple[int, int]] = []

    def sample(self, done: int) -> None:
        """Record the memory after ``done`` requests."""
        total = 0
        try:
            processes = [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:  # the server has ended, which is reported elsewhere
            processes = []
        for process in processes:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self.samples.append((done, total))

    def thirds(self) -> tuple[int, int, int]:
        """Return the peak in bytes of each third of the requests."""
        last = max((done for done, _ in self.samples), default=0)
        highest = [0, 0, 0]
        for done, size in self.samples:
            third = min(2, 3 * done // max(1, last))
            highest[third] = max(highest[third], size)
        return highest[0], highest[1], highest[2]


class Soak:
    """One run: the requests, their outcomes, and the failures."""

    def __init__(self, arguments: argparse.Namespace, server: Server) -> None:
        self.arguments = arguments
        self.server = server
        self.memory = Memory(server.process.pid)
        self.results: list[tuple[Plan, Outcome]] = []
        self.failures: list[str] = []
        self.seconds = 0.0
        self.verified = 0
        self._lock = threading.Lock()

    def fail(self, what: str) -> None:
        """Record a failure."""
        self.failures.append(what)

    def load(self) -> None:
        """Send all requests from all clients."""
        begun = time.monotonic()
        deadline = begun + self.arguments.minutes * 60
        numbers = iter(range(self.arguments.requests))

        def work() -> None:
            while time.monotonic() < deadline:
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    return
                plan = traffic.make(number, self.arguments.seed)
                outcome = carry_out(self.server.client, plan)
                with self._lock:
                    self.results.append((plan, outcome))
                    if len(self.results) % 10 == 0:
                        self.memory.sample(len(self.results))
                    if len(self.results) % 500 == 0:
                        print(f"  {len(self.results)} requests", flush=True)

        with ThreadPoolExecutor(self.arguments.clients) as clients:
            for client in [clients.submit(work) for _ in range(self.arguments.clients)]:
                client.result()
        self.seconds = time.monotonic() - begun
        if len(self.results) < self.arguments.requests:
            self.fail(f"only {len(self.results)} requests in {self.arguments.minutes} minutes")

    def check_outcomes(self) -> None:
        """Check every status, and that answers are complete."""
        for plan, outcome in self.results:
            gone = plan.manner == "vanish" and not outcome.message and outcome.status in (0, 200)
            right = gone or outcome.status == plan.status
            if right and plan.status != 200:
                right = plan.named in outcome.message
            elif right and plan.manner != "vanish":
                right = outcome.whole and bool(outcome.choices) and not outcome.message
            if not right:
                self.fail(
                    f"{describe(plan)}: expected {plan.status} {plan.named!r}, got "
                    f"{outcome.status} {outcome.message[:300]!r}"
                )

    def check_server(self) -> None:
        """Check that the server holds no requests or pages, and that its memory is flat."""
        try:
            poll(
                lambda: (
                    self.server.gauges() == (0.0, 0.0, 0.0)
                    and self.server.metric("vllm:diffusion_pages_held") == 0
                ),
                "an idle server without pages held",
            )
        except TimeoutError:
            self.fail(f"running, waiting, share of pages: {self.server.gauges()}")
        _, second, last = self.memory.thirds()
        if len(self.results) < WARM_UP_REQUESTS:
            return
        if last > MEMORY_BOUND * second:
            self.fail(f"memory grew from {second >> 20} to {last >> 20} MiB in the last third")

    def verify(self) -> None:
        """Compare answers with the offline ones; of partly read answers, the part that was read."""
        wanted = [
            (plan, outcome)
            for plan, outcome in self.results
            if plan.status == 200
            and outcome.status == 200
            and outcome.choices
            and (plan.number * 0.6180339887) % 1 < self.arguments.verify
        ]
        if not wanted:
            return
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder, "requests.json"), Path(folder, "answers.json")
            given.write_text(json.dumps([{"body": plan.body} for plan, _ in wanted]))
            command = [sys.executable, str(Path(__file__).with_name("offline.py"))]
            done = subprocess.run(
                [*command, str(given), str(found)],
                env=clean_environment(VLLM_LOGGING_LEVEL="ERROR"),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=self.arguments.minutes * 60,
                check=False,
            )
            if done.returncode:
                self.fail(f"the offline side ended with {done.returncode}:\n{done.stdout[-3000:]}")
                return
            answers = json.loads(found.read_text())
        for (plan, outcome), expected in zip(wanted, answers, strict=True):
            self.verified += 1
            for difference in differences(plan, outcome, expected):
                self.fail(f"{describe(plan)}: {difference}")

    def report(self) -> None:
        """Print counts, times and failures."""
        counts = collections.Counter(
            (plan.kind, "no answer" if outcome.status == 0 else str(outcome.status))
            for plan, outcome in self.results
        )
        print(f"\n| requests | answered with | number |\n|{'---|' * 3}")
        for (kind, status), number in sorted(counts.items()):
            print(f"| {kind} | {status} | {number} |")
        good = [o for p, o in self.results if p.kind == "good" and o.status == 200]
        first = [o.first_seconds for o in good if o.first_seconds is not None]
        gaps = [gap for o in good for gap in o.gap_seconds]
        print(f"\n| milliseconds | number | median | 90 % | 99 % | most |\n|{'---|' * 6}")
        for name, seconds in (("first piece", first), ("between pieces", gaps)):
            if len(seconds) > 1:
                cuts = statistics.quantiles(seconds, n=100, method="inclusive")
                values = (cuts[49], cuts[89], cuts[98], max(seconds))
                cells = " | ".join(f"{1000 * value:.0f}" for value in values)
                print(f"| {name} | {len(seconds)} | {cells} |")
        tokens = sum(len(c["tokens"]) for _, o in self.results for c in o.choices.values())
        thirds = ", ".join(str(size >> 20) for size in self.memory.thirds())
        print(
            f"\n{len(self.results)} requests from {self.arguments.clients} clients in "
            f"{self.seconds:.0f} s, {tokens} tokens; {self.verified} answers compared with the "
            f"offline ones.\nHighest memory of the server in each third: {thirds} MiB.\n"
        )
        for failure in self.failures[:SHOWN_FAILURES]:
            print(f"FAILED: {failure}")
        if len(self.failures) > SHOWN_FAILURES:
            print(f"and {len(self.failures) - SHOWN_FAILURES} more")
        print("FAILED" if self.failures else "passed")


def describe(plan: Plan) -> str:
    """Return a request as one line, with long values cut."""
    body = {
        name: value if len(str(value)) < 400 else f"{str(value)[:400]}..."
        for name, value in plan.body.items()
    }
    return f"request {plan.number} ({plan.manner}) /v1/{plan.path} {json.dumps(body)}"


def differences(plan: Plan, outcome: Outcome, expected: list[dict[str, Any]]) -> list[str]:
    """Return the differences between an answer and the offline one."""
    found = []
    if outcome.whole and len(outcome.choices) != len(expected):
        return [f"{len(outcome.choices)} choices, offline {len(expected)}"]
    for index, own in sorted(outcome.choices.items()):
        other = dict(expected[index])
        if plan.body.get("echo"):
            other["text"] = plan.body["prompt"] + other["text"]
            # Answers with `echo` have no token ids.
            own["tokens"] = other["tokens"]
        if not outcome.whole:
            tokens = other["tokens"][: len(own["tokens"])]
            if own["tokens"] != tokens or not other["text"].startswith(own["text"]):
                found.append(f"choice {index} begins {own['tokens']}, offline {tokens}")
            continue
        for name in ("tokens", "text", "finish_reason", "stop_reason"):
            if own.get(name) != other[name]:
                found.append(f"choice {index}, {name}: {own.get(name)!r}, offline {other[name]!r}")
        scores, others = own["logprobs"] or [], other["logprobs"] or []
        if len(scores) != len(others) or any(
            abs(a - b) > LOGPROB_TOLERANCE for a, b in zip(scores, others, strict=True)
        ):
            found.append(f"choice {index}, logprobs: {scores}, offline {others}")
        trace = plan.body.get("vllm_xargs", {}).get("diffusion_trace")
        if bool(trace) != (own["trace"] is not None):
            found.append(f"choice {index}: diffusion_trace {trace}, got {own['trace']}")
        elif trace and len(own["trace"]["steps"]) != len(own["tokens"]):
            found.append(
                f"choice {index}: a trace of {len(own['trace']['steps'])} tokens for "
                f"{len(own['tokens'])}"
            )
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120, help="limit of the load")
    parser.add_argument("--verify", type=float, default=1.0, help="share that is compared")
    parser.add_argument("--schema-examples", type=int, default=300, help="an endpoint; 0: none")
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the soak test, return the exit status."""
    arguments = parse()
    log = arguments.log or Path(tempfile.mkdtemp()) / "server.log"
    print(f"the server's log: {log}", flush=True)
    with running_server(log, tiny_llada(), *SERVER_OPTIONS) as server:
        response = server.client.post(
            "/tokenize", json={"model": "tiny", "prompt": traffic.E_ACUTE}
        )
        traffic.learn(response.json()["tokens"])
        soak = Soak(arguments, server)
        probe = server.answer("completions", **PROBE)["choices"][0]["token_ids"]
        soak.load()
        if arguments.schema_examples:
            fuzz(soak)
        soak.check_outcomes()
        soak.check_server()
        if server.answer("completions", **PROBE)["choices"][0]["token_ids"] != probe:
            soak.fail("the server answers otherwise after the load than before")
    soak.verify()
    soak.report()
    return bool(soak.failures)


def fuzz(soak: Soak) -> None:
    """Send requests generated from the server's own OpenAPI description."""
    from tests.e2e.openapi import check_endpoints, check_odd_values

    try:
        check_endpoints(soak.server, soak.arguments.schema_examples)
        check_odd_values(soak.server)
    except AssertionError as error:
        soak.fail(f"requests made from the OpenAPI description: {error}")


if __name__ == "__main__":
    sys.exit(main())
