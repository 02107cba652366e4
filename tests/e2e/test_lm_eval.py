# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness scores a served model, by the documented commands, without a network."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.offline import answer_all
from tests.e2e.server import ROOT, Server, tiny_llada
from tests.e2e.test_readme import README, Block, blocks_of, environment, titles
from tests.scripts import EXAMPLES, load

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [
    block
    for text in (README, PAGE)
    for block in blocks_of(text)
    if block.text.startswith("lm_eval ") and not block.comment
]
FOLDER = EXAMPLES / "lm_eval"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def extra_of(block: Block) -> dict[str, Any]:
    """Return the diffusion parameters in a command."""
    found = re.search(r"--gen_kwargs '(.*)'", block.text)
    return json.loads(found[1])["vllm_xargs"] if found else {}


def run(server: Server, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the documents against the server, from the root of the repository."""
    port = server.client.base_url.port
    command = command.replace("localhost:8000", f"127.0.0.1:{port}")
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment() | OFFLINE | {"HF_HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def exact_match(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Return, for each set of diffusion parameters, the score of the engine's own answers."""
    (tasks,) = load(EXAMPLES / "quality", "tasks")
    (items,) = load(FOLDER, "items")
    vocabulary = tasks.Vocabulary(tiny_llada())
    asked = [i for task in items.TASKS for i in tasks.held_out(task, items.LENGTH, items.NUM_ITEMS)]
    settings = [extra_of(block) for block in COMMANDS]
    requests = [
        {"prompt": vocabulary.encode(item.prompt), "options": {"max_tokens": 32, **extra}}
        for extra in settings
        for item in asked
    ]
    answers = answer_all(requests, tmp_path_factory.mktemp("offline"))
    scores = {}
    for number, extra in enumerate(settings):
        own = answers[number * len(asked) :][: len(asked)]
        right = sum(a["text"] == i.answer_text for (a,), i in zip(own, asked, strict=True))
        scores[json.dumps(extra)] = right / len(asked)
    return scores


@pytest.fixture(scope="module")
def server(exact_match: dict[str, float], default_server: Server) -> Server:
    """The shared server, once the offline answers exist too."""
    return default_server


def test_the_items_are_those_of_the_generator() -> None:
    """The file of items is up to date; if not, run examples/lm_eval/items.py."""
    (items,) = load(FOLDER, "items")
    (tasks,) = load(EXAMPLES / "quality", "tasks")
    assert items.rows(tasks.held_out) == items.FILE.read_text(encoding="utf-8")


def test_the_commands_ask_for_different_things(exact_match: dict[str, float]) -> None:
    """Scores differ; otherwise, parameters that do not reach the server would go unnoticed."""
    assert len(COMMANDS) == 2
    assert len(set(exact_match.values())) == 2, exact_match
    assert all(0 < score <= 1 for score in exact_match.values())


@pytest.mark.parametrize("block", COMMANDS, ids=titles(COMMANDS))
def test_score(block: Block, server: Server, exact_match: dict[str, float], tmp_path: Path) -> None:
    """The score that a documented command prints is the one computed offline."""
    done = run(server, block.text, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    printed = re.findall(r"\|\s*exact_match\s*\|[^|]*\|\s*([\d.]+)\s*\|", done.stdout)
    assert [float(value) for value in printed] == [
        pytest.approx(exact_match[json.dumps(extra_of(block))], abs=5e-5)
    ], done.stdout[-6000:]


def test_log_likelihoods_are_refused(server: Server, tmp_path: Path) -> None:
    """A task that compares answers by their log-likelihoods ends with the server's message."""
    choice = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(FOLDER / "recall.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{[answer, ' file']}}",
    }
    (tmp_path / "choice.yaml").write_text(json.dumps(choice), encoding="utf-8")
    (completions,) = (b for b in COMMANDS if "local-completions" in b.text)
    command = completions.text.replace("tiny_recall", "tiny_choice --limit 1")
    command = command.replace("examples/lm_eval", str(tmp_path))
    command = command.replace("num_concurrent=8", "num_concurrent=1,max_retries=1")
    done = run(server, command, tmp_path)
    assert done.returncode != 0
    assert "echo with logprobs" in done.stdout, done.stdout[-6000:]
