# SPDX-License-Identifier: Apache-2.0
"""Several devices: tensor parallelism gives one device's tokens with both executors; replicas.

With ``ALL_LAYOUTS=1`` in the environment, every combination of executor, model, and key/value heads
split or replicated is run; otherwise, each of these values at least once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import EngineArgs

from tests.e2e.cases import POLICIES, Case
from tests.e2e.parallel import (
    EOS,
    EXPRESSION,
    EXPRESSION_TOKENS,
    LAYOUTS,
    VOCAB,
    Result,
    expected_pages,
)
from tests.e2e.server import (
    ROOT,
    Server,
    clean_environment,
    free_port,
    poll,
    run_program,
    run_warm,
    tiny_llada,
)
from tests.e2e.test_readme import PARALLEL, RAY, Block
from tests.e2e.test_readme import environment as environment_of_readme
from tests.reference import Model, load, write_checkpoint
from tests.reference import generate as reference
from tests.reference.grammars import Grammar
from vllm_sparse_dllm.plugin import RAY_ON_CPU
from vllm_sparse_dllm.settings import SALIENCIES

#: Ranks divide all of the machine's cores, as without other tests at the same time.
pytestmark = pytest.mark.usefixtures("all_cores")

NAMES = list(LAYOUTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def results(folder: Path) -> Iterator[dict[str, Result]]:
    """Return each layout's result; the first access runs all layouts of the same backend."""
    yield _Results(folder)


class _Results(dict[str, Result]):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Result:
        backend = LAYOUTS[name].backend
        arguments = ["-m", "tests.e2e.parallel", backend, str(self.folder)]
        if backend == "ray":
            environment = clean_environment(**{RAY_ON_CPU: "1"})
            run_program([sys.executable, *arguments], environment=environment)
        else:
            run_warm(arguments, self.folder / "log")
        found = json.loads((self.folder / f"{backend}.json").read_text())
        self.update({layout: Result(**result) for layout, result in found.items()})
        return self[name]


def _near_tie(model: Model, case: Case, output: list[int]) -> bool:
    """Return whether rounding weights differently gives these tokens, or changes tokens at all.

    Ranks add up floating-point numbers in another order than one device does.
    """
    generator = torch.Generator().manual_seed(1)

    def rounded(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor * (1 + 1e-6 * noise)

    for _ in range(3):
        layers = [
            dataclasses.replace(
                layer,
                **{f.name: rounded(getattr(layer, f.name)) for f in dataclasses.fields(layer)},
            )
            for layer in model.layers
        ]
        other = case.expected(dataclasses.replace(model, layers=layers))
        if other == output or other != case.expected(model):
            return True
    return False


def test_layouts_have_every_policy_and_choice() -> None:
    for layout in LAYOUTS.values():
        options = [case.options for case in layout.cases]
        assert {own.get("cache_policy", "sparse") for own in options} == set(POLICIES)
        sparse = [own for own in options if own.get("cache_policy", "sparse") == "sparse"]
        assert {own.get("granularity", "token") for own in sparse} == {"token", "page"}
        assert {own.get("saliency", "paper") for own in sparse} == set(SALIENCIES)
        assert any(own.get("eviction_delay") for own in sparse)
        assert any("threshold" in own for own in options)
        assert any(own.get("temperature") for own in options)
        assert any("repetition_penalty" in own for own in options)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_one_device(
    name: str, results: dict[str, Result], folder: Path
) -> None:
    """Compared with the reference, which `test_tokens` compares one device with."""
    layout, result = LAYOUTS[name], results[name]
    model = load(layout.write(folder))
    different = [
        (case, output)
        for case, output in zip(layout.cases, result.outputs, strict=False)
        if output != case.expected(model)
    ]
    wrong = [str(case) for case, output in different if not _near_tie(model, case, output)]
    assert not wrong
    assert len(different) <= 1, [str(case) for case, _ in different]


@pytest.mark.parametrize("name", NAMES)
def test_structured_output(name: str, results: dict[str, Result], folder: Path) -> None:
    layout = LAYOUTS[name]
    path = layout.write(folder)
    grammar = Grammar("regex", EXPRESSION, str(tiny_llada()), VOCAB, spaces=False)
    expected = reference(
        load(path),
        layout.cases[0].prompt,
        EXPRESSION_TOKENS,
        allowed=grammar.allowed,
        ignore_eos=False,
        eos_id=EOS,
    )
    assert results[name].outputs[-1] == expected


@pytest.mark.parametrize("name", NAMES)
def test_ranks_keep_the_same_positions(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    assert len(result.choices) == LAYOUTS[name].ranks
    assert len(set(result.choices)) == 1
    assert min(result.num_choices) > 10


@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_the_heads_of_a_rank(name: str, results: dict[str, Result]) -> None:
    assert results[name].num_pages == expected_pages(LAYOUTS[name])


def check_cores(cores: list[list[int]]) -> None:
    """Check that every rank has cores of its own, or shares some if they are too few for that."""
    assert all(cores)
    if len(os.sched_getaffinity(0)) >= len(cores):
        assert len({core for own in cores for core in own}) == sum(map(len, cores))


@pytest.mark.parametrize("name", [name for name in NAMES if LAYOUTS[name].backend == "ray"])
def test_ranks_on_ray_share_the_cores(name: str, results: dict[str, Result]) -> None:
    """The ranks of the README's servers are those of vLLM's own executor."""
    check_cores(results[name].cores)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            {"heads": 6, "kv_heads": 2},
            {"tensor_parallel_size": 3},
            "tensor_parallel_size must divide the 2 key/value heads .* multiple of them, got 3",
        ),
        (
            {"heads": 4, "mlp": 193},
            {"tensor_parallel_size": 2},
            "tensor_parallel_size must divide the 193 feed-forward channels .*, got 2",
        ),
        (
            {"heads": 3},
            {"tensor_parallel_size": 3},
            "tensor_parallel_size must divide the 320 rows .* padded vocabulary, got 3",
        ),
        (
            {"heads": 4},
            {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
            f"{RAY_ON_CPU}=1 on a CPU, got None",
        ),
        (
            {"heads": 4},
            {"pipeline_parallel_size": 2},
            "pipeline_parallel_size must be 1 for diffusion models, got 2: a step needs the tokens",
        ),
    ],
)
def test_refused_at_start(
    shape: dict[str, int], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shape = {"d_model": 32 * shape["heads"], "layers": 1, "mlp": 192, "vocab": 320, **shape}
    path = write_checkpoint(tmp_path, "llada", **shape)
    with pytest.raises(ValueError, match=message):
        EngineArgs(str(path), skip_tokenizer_init=True, **options).create_engine_config()


# The README's commands.


@contextmanager
def readme_server(block: Block, log: Path, **environment: str) -> Iterator[Server]:
    """Run a server by a command of the README, and stop it as a service manager does."""
    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {block.text.strip()} --dtype float32 --port {port}"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**environment_of_readme(), **environment},
            cwd=ROOT,
        )
    server = Server(process, port, log)
    try:
        poll(server.healthy, "the server to answer")
        yield server
    except BaseException:
        server.stop()
        raise
    assert server.stop() == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def ray_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run Ray by the README's command, in the foreground; return the environment to use it with."""
    # Paths of sockets must be short, and clusters must not share files.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    exported = dict(re.findall(r"^export (\w+)=(\w+)$", RAY[0].text, flags=re.MULTILINE))
    port, client_port = free_port(), free_port()
    command = RAY[0].text.replace("ray start", "exec ray start").strip()
    command += f" --block --port {port} --ray-client-server-port {client_port}"
    command += " --include-dashboard false"
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-euc", command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**environment_of_readme(), "RAY_TMPDIR": folder},
            cwd=ROOT,
        )
    try:

        def started() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        poll(started, "Ray to start")
        yield {"RAY_TMPDIR": folder, **exported}
    finally:
        process.terminate()
        process.wait(timeout=300)
        shutil.rmtree(folder, ignore_errors=True)


#: A task that the embedded model has learnt, and its answer.
REQUEST = {
    "model": "tiny-llada",
    "prompt": "<|startoftext|><|user|> default used [ file name object list ] method class given "
    "copy<|eot_id|><|assistant|>",
    "max_tokens": 32,
    "vllm_xargs": {"diffusion_keep_ratio": 0.7, "diffusion_steps": 16},
}
ANSWER = "file name object list"


def check_answers(server: Server, replicas: int) -> None:
    """Send requests at once; check that all are answered and that every replica has worked."""
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: server.answer("completions", **REQUEST), range(8))
        assert {answer["choices"][0]["text"].strip() for answer in answers} == {ANSWER}
    for engine in map(str, range(replicas)):
        for name in ("request_success_total", "diffusion_num_committed_tokens_total"):
            assert server.metric(f"vllm:{name}", engine=engine) > 0, (name, engine)
        assert server.metric("vllm:diffusion_pages", engine=engine) > 0
        assert server.metric("vllm:kv_cache_usage_perc", engine=engine) == 0


@pytest.mark.parametrize("block", PARALLEL, ids=[str(number) for number in range(len(PARALLEL))])
def test_servers_of_the_readme(
    block: Block, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = re.search(r"--data-parallel-size (\d+)", block.text)
    on_ray = block.comment.endswith("on Ray")
    environment = request.getfixturevalue("ray_environment") if on_ray else {}
    with readme_server(block, tmp_path / "log", **environment) as server:
        check_answers(server, int(found[1]) if found else 1)
        if not on_ray:
            ranks = server.processes("Worker")
            assert len(ranks) == 2
            check_cores([rank.cpu_affinity() for rank in ranks])
