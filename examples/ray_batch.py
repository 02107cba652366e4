# SPDX-License-Identifier: Apache-2.0
"""Answer a file of prompts with several replicas of the engine, on Ray Data.

INPUT is JSON lines, a request each: ``prompt`` (text), ``prompt_token_ids`` or ``messages``; and,
all optional, ``id`` (anything, it comes back), ``diffusion_*`` and the names of `PARAMETERS`.
OUTPUT is a folder. While the job runs it holds a file for each finished batch; at the end
``results.jsonl``: a line for each request, in the order of the input, with ``line`` (where it
stands there, from 1), ``id``, and either ``text``, ``token_ids`` and ``finish_reason`` (and
``diffusion_trace`` if it was asked for), or ``error``. A request that fails harms no other. What
is ``null`` counts as left out, except an ``id`` and a ``diffusion_*``.

The job can be ended at any moment, also by a crash: the same command goes on where it was, and
does nothing if all is done. Only this process writes, a batch at a time by renaming a whole file,
so no request is answered twice or lost. A replica that dies is started again by Ray, and its
batches run once more; each request has its own seed, so in float32 they give the same tokens.
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

#: Parameters of vLLM that a request may name.
PARAMETERS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "bad_words"),
    *("logit_bias", "allowed_token_ids", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "structured_outputs"),
)
PROMPTS = ("prompt", "prompt_token_ids", "messages")
PREFIX = "diffusion_"
#: Under which a request asks for its trace, and gets it.
TRACE = "diffusion_trace"
#: How a request ends that was answered; vLLM's names.
ANSWERED = ("stop", "length")
#: Batches in a replica at once: the next one takes the places that the last one leaves free.
BATCHES_AT_ONCE = 2

RESULTS = "results.jsonl"
JOB = "job.json"

Row = dict[str, Any]


# In the replicas.


@dataclass
class Batch:
    """Requests that were handed in together.

    Attributes:
        requests: JSON of each, by line.
        identities: What each result says of its request, by line.
        results: What was found so far, by line.
        answered: All results as JSON, in the order of the requests.
    """

    requests: dict[int, bytes]
    identities: dict[int, Row] = field(default_factory=dict)
    results: dict[int, Row] = field(default_factory=dict)
    answered: Future[list[str]] = field(default_factory=Future)

    def answer(self, line: int, result: Row) -> None:
        """Note a result; the last one completes the batch."""
        self.results[line] = {"line": line, **self.identities.get(line, {}), **result}
        if len(self.results) == len(self.requests):
            self.answered.set_result([json.dumps(self.results[line]) for line in self.requests])


class Replica:
    """An engine, in an actor of Ray's.

    One thread owns the engine and runs it. Calls hand batches to it and wait, so the requests of
    several batches share the engine's steps. The engine core is in the same process
    (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): when that is killed, nothing is left over.
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
        """Start the engine and run it for ever."""
        try:
            from vllm import LLM

            from vllm_sparse_dllm.assets import embedded_model

            self._llm = LLM(self._model or embedded_model(), **self._engine)
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        #: Batch and line of each request in the engine, by the engine's name for it.
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
            # The engine is broken, which is no fault of single requests: the job ends.
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
                # Whatever it is: vLLM's renderers raise all kinds of errors for odd messages.
                batch.answer(line, {"error": str(error) or type(error).__name__})
            else:
                batches[name] = (batch, line)

    def _enqueue(self, request: Row, params: Any) -> str:
        """Give the engine a request, return the name that its output will have."""
        if "messages" in request:
            (name,) = self._llm.enqueue_chat(request["messages"], params, use_tqdm=False)
        else:
            ids = request.get("prompt_token_ids")
            prompt = request["prompt"] if ids is None else {"prompt_token_ids": ids}
            (name,) = self._llm.enqueue(prompt, params, use_tqdm=False)
        # The engine's own name has a random end, which outputs are without.
        return name.partition("-")[0]


def parse(text: bytes) -> Row:
    """Return the request of a line.

    Raises:
        ValueError: If it is not an object with one kind of prompt and known names.
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
    """Refuse a prompt that is no text.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, got {prompt!r:.80}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(f"prompt must be valid Unicode, got {prompt!a:.80}") from None


def _check_ids(ids: Any) -> None:
    """Refuse a prompt that is not a list of ids; the engine knows how large they may be.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(ids, list) or any(type(number) is not int for number in ids):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {ids!r:.80}")


def _check_messages(messages: Any) -> None:
    """Refuse what is not one conversation; vLLM would take a list of lists for several.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list of at least one object, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"each of messages must be an object with a role, got {message!r:.80}")


def sampling(request: Row, defaults: Row, line: int) -> Any:
    """Return vLLM's parameters for a request.

    One without a ``seed``, or with vLLM's word for none, -1, has the job's plus its line: its own,
    and the same in every run.

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
    """Return what is told of a finished request (vLLM's ``RequestOutput``)."""
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


# In this process.


def read_requests(path: Path) -> dict[int, bytes]:
    """Return the lines of a file that are not blank, by number, from 1."""
    lines = enumerate(path.read_bytes().split(b"\n"), start=1)
    return {number: line for number, line in lines if line.strip()}


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, also if the machine stops."""
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
    """The folder of a job.

    Attributes:
        results: What was found so far: a line of JSON for each request, by line of the input.
    """

    def __init__(self, folder: Path, job: Row) -> None:
        """Open a folder, or make it.

        Raises:
            SystemExit: If it is another job's, or another process is at work in it.
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
        """Keep the results of a batch."""
        # Named by its first line, a batch that came twice would replace itself.
        write(self._folder / f"part-{lines[0]:09d}.jsonl", "".join(f"{r}\n" for r in results))
        self.results.update(zip(lines, results, strict=True))

    def finish(self) -> None:
        """Make one file of all results, in the order of the input."""
        lines = "".join(f"{self.results[line]}\n" for line in sorted(self.results))
        write(self._folder / RESULTS, lines)
        self._remove_parts()

    def _remove_parts(self) -> None:
        """Remove what is in the one file, also where a job ended before it could."""
        for part in self._folder.glob("part-*"):
            part.unlink()


def answers(
    requests: dict[int, bytes], options: argparse.Namespace, defaults: Row
) -> Iterator[tuple[list[int], list[str]]]:
    """Yield lines and results of each batch, as batches are finished."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    lines = list(requests)
    tables = []
    for start in range(0, len(lines), options.batch_size):
        chosen = lines[start : start + options.batch_size]
        tables.append(pa.table({"line": chosen, "request": [requests[line] for line in chosen]}))
    # A batch is a task and gives one block, so a task that is repeated gives all of it again.
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
