# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts with several replicas of the engine, on Ray Data.

INPUT is a file of JSON lines, one request per line: ``prompt`` (text), ``prompt_token_ids`` or
``messages``, and optionally ``id`` (any value, returned with the result), ``diffusion_*`` and the
names in `PARAMETERS`. OUTPUT is a folder. While the job runs it holds a file for each finished
batch; at the end it holds ``results.jsonl``: a line for each request, in the order of the input,
with ``line`` (its line number in the input, from 1), ``id``, and either ``text``, ``token_ids`` and
``finish_reason`` (and ``diffusion_trace`` if the request asked for it), or ``error``. A request
that fails does not affect others. A field that is ``null`` counts as absent, except ``id`` and
``diffusion_*``.

The job can stop at any moment, even by a crash: running the same command again resumes it, and
does nothing if the job is complete. Only this process writes, one batch at a time by renaming a
complete file, so every request has exactly one result. Ray restarts a replica that dies, and its
batches run again; each request has its own seed, so in float32 they yield the same tokens.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray_cluster import REPLICA_ENVIRONMENT, connect
from tqdm import tqdm

#: Sampling parameters of vLLM that a request can set.
PARAMETERS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "bad_words"),
    *("logit_bias", "allowed_token_ids", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "structured_outputs"),
)
PROMPTS = ("prompt", "prompt_token_ids", "messages")
PREFIX = "diffusion_"
#: The field in which a request asks for its trace, and in which its result has it.
TRACE = "diffusion_trace"
#: vLLM's finish reasons of requests that were answered.
ANSWERED = ("stop", "length")
#: Batches in a replica at once: requests of the next batch take the places that the last one frees.
BATCHES_AT_ONCE = 2

RESULTS = "results.jsonl"
JOB = "job.json"

Row = dict[str, Any]


# Code that runs in the replicas.


@dataclass
class Batch:
    """Requests that were submitted together.

    Attributes:
        requests: JSON of each request, by line.
        identities: Fields of each request that its result repeats (``id``), by line.
        results: Results so far, by line.
        answered: All results as JSON, in the order of the requests.
    """

    requests: dict[int, bytes]
    identities: dict[int, Row] = field(default_factory=dict)
    results: dict[int, Row] = field(default_factory=dict)
    answered: Future[list[str]] = field(default_factory=Future)

    def answer(self, line: int, result: Row) -> None:
        """Record a result; the last one completes the batch."""
        self.results[line] = {"line": line, **self.identities.get(line, {}), **result}
        if len(self.results) == len(self.requests):
            self.answered.set_result([json.dumps(self.results[line]) for line in self.requests])


class Replica:
    """An engine in a Ray actor.

    One thread owns and runs the engine. Calls hand batches to it and wait, so requests of several
    batches share the engine's steps. The engine core runs in the same process
    (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so killing that process leaves nothing behind.
    """

    def __init__(self, model: str | None, engine: dict[str, Any], defaults: Row) -> None:
        self._model, self._engine, self._defaults = model, engine, defaults
        self._inbox: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._ready: Future[None] = Future()
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        self._ready.result()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer a batch.

        Args:
            table: Columns ``line`` (integers) and ``request`` (JSON).

        Returns:
            Columns ``line`` and ``result`` (JSON), in the same order.
        """
        batch = Batch({row["line"]: row["request"] for row in table.to_pylist()})
        self._inbox.put(batch)
        return pa.table({"line": table["line"], "result": batch.answered.result()})

    def _run(self) -> None:
        """Start the engine and run it forever."""
        try:
            from vllm import LLM

            from vllm_sparse_dllm.assets import embedded_model

            self._llm = LLM(self._model or embedded_model(), **self._engine)
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        #: Batch and line of each request in the engine, by its request id.
        batches: dict[str, tuple[Batch, int]] = {}
        unanswered: list[Batch] = []
        try:
            while True:
                while not batches or not self._inbox.empty():
                    unanswered = [batch for batch in unanswered if not batch.answered.done()]
                    unanswered.append(self._inbox.get())
                    self._admit(unanswered[-1], batches)
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        batch, line = batches.pop(output.request_id)
                        batch.answer(line, result_of(output))
        except BaseException as error:
            # The engine itself failed, not a single request: fail all batches, so the job ends.
            for batch in unanswered:
                if not batch.answered.done():
                    batch.answered.set_exception(error)
            while True:
                self._inbox.get().answered.set_exception(error)

    def _admit(self, batch: Batch, batches: dict[str, tuple[Batch, int]]) -> None:
        """Give the engine a batch; requests that cannot be run are answered at once."""
        for line, text in batch.requests.items():
            try:
                request = parse(text)
                batch.identities[line] = {"id": request["id"]} if "id" in request else {}
                name = self._enqueue(request, sampling(request, self._defaults, line))
            except Exception as error:
                # vLLM's renderers raise all kinds of exceptions for malformed messages.
                batch.answer(line, {"error": str(error) or type(error).__name__})
            else:
                batches[name] = (batch, line)

    def _enqueue(self, request: Row, params: Any) -> str:
        """Add a request to the engine, return the request id that its output will have."""
        if "messages" in request:
            (name,) = self._llm.enqueue_chat(request["messages"], params, use_tqdm=False)
        else:
            ids = request.get("prompt_token_ids")
            prompt = request["prompt"] if ids is None else {"prompt_token_ids": ids}
            (name,) = self._llm.enqueue(prompt, params, use_tqdm=False)
        # The engine's internal id has a random suffix, which the id in outputs lacks.
        return name.partition("-")[0]


def parse(text: bytes) -> Row:
    """Return the request on a line.

    Raises:
        ValueError: If it is not a JSON object with exactly one kind of prompt and known fields.
    """
    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ValueError(f"a request must be an object, got {type(request).__name__}")
    optional = {*PROMPTS, *PARAMETERS}
    request = {k: v for k, v in request.items() if v is not None or k not in optional}
    if sum(name in request for name in PROMPTS) != 1:
        raise ValueError(f"a request must have one of {', '.join(PROMPTS)}")
    if "messages" in request:
        _check_messages(request["messages"])
    if "prompt" in request:
        _check_text(request["prompt"])
    if "prompt_token_ids" in request:
        _check_ids(request["prompt_token_ids"])
    known = {"id", *PROMPTS, *PARAMETERS}
    for name in request:
        if name not in known and not name.startswith(PREFIX):
            raise ValueError(f"{name!r} must be one of {', '.join(sorted(known))} or {PREFIX}...")
    return request


def _check_text(prompt: Any) -> None:
    """Check that a prompt is valid text.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, got {prompt!r:.80}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"prompt must be valid Unicode, got {prompt!a:.80}") from None


def _check_ids(ids: Any) -> None:
    """Check that a prompt is a list of token ids; the engine checks their range.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(ids, list) or any(type(number) is not int for number in ids):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {ids!r:.80}")


def _check_messages(messages: Any) -> None:
    """Check that messages are one conversation; vLLM would take a list of lists for several.

    Raises:
        ValueError: If they are not.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of at least one object, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"each of messages must be an object with a role, got {message!r:.80}")


def sampling(request: Row, defaults: Row, line: int) -> Any:
    """Return vLLM's sampling parameters for a request.

    A request without a ``seed``, or with -1, by which vLLM means none, gets the job's seed plus its
    line number: a seed of its own that is the same in every run.

    Raises:
        ValueError: If a value has the wrong type or is not allowed.
    """
    import msgspec
    from vllm import SamplingParams

    own = {name: value for name, value in request.items() if name in PARAMETERS}
    if own.get("seed") == -1:
        del own["seed"]
    given = {**defaults, "seed": defaults["seed"] + line, **own}
    given["extra_args"] = {k: v for k, v in request.items() if k.startswith(PREFIX)} or None
    return msgspec.convert(given, SamplingParams, str_keys=True)


def result_of(output: Any) -> Row:
    """Return the result of a finished request (vLLM's ``RequestOutput``)."""
    completion = output.outputs[0]
    if completion.finish_reason not in ANSWERED:
        return {"error": f"the engine ended it: {completion.finish_reason}; its log says why"}
    result = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    trace = getattr(completion, TRACE, None)
    return result if trace is None else {**result, TRACE: trace}


# Code that runs in this process.


def read_requests(path: Path) -> dict[int, bytes]:
    """Return the non-blank lines of a file by line number, from 1."""
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return {number: line for number, line in lines if line.strip()}


def write(path: Path, text: str) -> None:
    """Write a file atomically, even if the machine crashes."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Output:
    """The output folder of a job.

    Attributes:
        results: Results so far: a line of JSON for each request, by line of the input.
    """

    def __init__(self, folder: Path, job: Row) -> None:
        """Open the folder, or create it.

        Raises:
            SystemExit: If it belongs to another job, another process is at work in it, or its
                contents are damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"error: another process is at work in {folder}") from None
        if not (folder / JOB).exists():
            write(folder / JOB, json.dumps(job, indent=1))
        try:
            began = dict(json.loads((folder / JOB).read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise SystemExit(
                f"error: {folder / JOB} is damaged, so nobody knows what the results are of; "
                "name another folder"
            ) from None
        for name in job:
            if began.get(name) != job[name]:
                raise SystemExit(
                    f"error: {folder} is the output of another job: its {name} was "
                    f"{began.get(name)!r} and now is {job[name]!r}; name another folder"
                )
        self.results: dict[int, str] = {}
        parts = [folder / RESULTS] if self.complete else sorted(folder.glob("part-*.jsonl"))
        for part in parts:
            for text in part.read_text(encoding="utf-8").splitlines():
                try:
                    self.results[int(json.loads(text)["line"])] = text
                except (ValueError, TypeError, KeyError):
                    raise SystemExit(
                        f"error: {part} is damaged: {text[:80]!r} is no result; delete it, and "
                        "run the command again"
                    ) from None
        if self.complete:
            self._remove_parts()

    @property
    def complete(self) -> bool:
        return (self._folder / RESULTS).exists()

    def add(self, lines: list[int], results: list[str]) -> None:
        """Add the results of a batch and write them to a file."""
        # The file is named after the batch's first line, so a repeated batch replaces itself.
        write(self._folder / f"part-{lines[0]:09d}.jsonl", "".join(f"{r}\n" for r in results))
        self.results.update(zip(lines, results, strict=True))

    def finish(self) -> None:
        """Write all results into one file, in the order of the input."""
        lines = "".join(f"{self.results[line]}\n" for line in sorted(self.results))
        write(self._folder / RESULTS, lines)
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove the batches' files, whose results the final file has."""
        for part in self._folder.glob("part-*"):
            part.unlink()


def answers(
    requests: dict[int, bytes], options: argparse.Namespace, defaults: Row
) -> Iterator[tuple[list[int], list[str]]]:
    """Yield lines and results of each batch as it finishes."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    lines = list(requests)
    tables = []
    for start in range(0, len(lines), options.batch_size):
        chosen = lines[start : start + options.batch_size]
        tables.append(pa.table({"line": chosen, "request": [requests[line] for line in chosen]}))
    # A batch is one task that yields one block, so a repeated task yields the whole batch again.
    results = ray.data.from_blocks(tables).map_batches(
        Replica,
        fn_constructor_args=(options.model, options.engine_args, defaults),
        batch_size=options.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=options.replicas,
            max_tasks_in_flight_per_actor=BATCHES_AT_ONCE,
            max_concurrent_calls_per_actor=BATCHES_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        runtime_env={"env_vars": {**REPLICA_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}},
    )
    for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield block["line"].to_pylist(), block["result"].to_pylist()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("input", type=Path, help="JSON lines, a request each")
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--replicas", type=int, default=2, help="default: %(default)s")
    parser.add_argument(
        "--num-cpus", type=float, default=1, help="cores for each; default: %(default)s"
    )
    parser.add_argument(
        "--num-gpus", type=float, default=0, help="GPUs for each; default: %(default)s"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="requests of a batch; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=256, help="for requests without; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--engine-args",
        type=json.loads,
        default={"kv_cache_memory_bytes": 256 << 20},
        metavar="JSON",
        help="arguments of vLLM's LLM; default: %(default)s",
    )
    options = parser.parse_args()
    least = {"replicas": 1, "batch_size": 1, "max_tokens": 1}
    for name, bound in {**least, "num_cpus": 0, "num_gpus": 0, "seed": 0}.items():
        value = getattr(options, name)
        if not bound <= value < math.inf:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} must be at least {bound}, got {value}")
    if not isinstance(options.engine_args, dict):
        parser.error(f"--engine-args must be an object, got {options.engine_args!r}")
    if not options.input.is_file():
        parser.error(f"there is no file {options.input}")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"{options.output} is no folder")
    return options


def main() -> None:
    options = parse_arguments()
    requests = read_requests(options.input)
    defaults = {"max_tokens": options.max_tokens, "temperature": 0.0, "seed": options.seed}
    job = {
        "input": hashlib.sha256(options.input.read_bytes()).hexdigest(),
        "model": options.model,
        "engine_args": options.engine_args,
        "defaults": defaults,
    }
    output = Output(options.output, job)
    if not output.complete:
        left = {line: text for line, text in requests.items() if line not in output.results}
        if left:
            connect()
            with tqdm(total=len(requests), initial=len(output.results), unit="request") as bar:
                for lines, results in answers(left, options, defaults):
                    output.add(lines, results)
                    bar.update(len(lines))
        if output.results.keys() != requests.keys():
            missing = len(requests.keys() - output.results.keys())
            raise SystemExit(f"error: {missing} requests have no answer; run the command again")
        output.finish()
    failed = [line for line, text in output.results.items() if "error" in json.loads(text)]
    print(f"{len(output.results) - len(failed)} answered, {len(failed)} failed", end="")
    print(f" (first: line {min(failed)})" if failed else "", end="")
    print(f": {options.output / RESULTS}")


if __name__ == "__main__":
    main()
