# SPDX-License-Identifier: Apache-2.0
"""OpenCompass loads the configurations, and its model classes send the requests they describe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.server import ROOT, Server, run_program, running_server, tiny_llada

FOLDER = ROOT / "examples" / "opencompass"
PYTHON = ROOT / ".venv-opencompass" / "bin" / "python"
BEGIN = "<|startoftext|>"
#: The paper's decoding settings, written out independently of the configurations.
PAPER = {
    "diffusion_cache_policy": "sparse",
    "diffusion_keep_ratio": 0.5,
    "diffusion_kernel_size": 3,
    "diffusion_delay_steps": 1,
    "diffusion_saliency": "paper",
    "diffusion_eviction_delay": 0,
    "diffusion_block_length": 32,
    "diffusion_steps": 256,
    "diffusion_factor": "none",
}
LLADA = {"temperature": 0, "vllm_xargs": {**PAPER, "diffusion_remasking": "low_confidence"}}
DREAM = {
    "temperature": 0.2,
    "top_p": 0.95,
    "seed": 2025,
    "vllm_xargs": {**PAPER, "diffusion_remasking": "entropy"},
}
#: For each configuration, text in front of the question, and request parameters.
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llada_8b_instruct": ("", LLADA),
    "llada_1_5": ("", LLADA),
    "dream_v0_base_7b": (BEGIN, DREAM),
    "dream_v0_instruct_7b": ("", DREAM),
}

pytestmark = pytest.mark.skipif(
    not (PYTHON.parents[1] / ".installed").exists(),
    reason="OpenCompass has an environment of its own, which `make opencompass-check` makes",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose own settings differ from the paper's."""
    settings = {
        "sparse_dllm": {
            "cache_policy": "none",
            "block_length": 64,
            "factor": 2.0,
            "saliency": "window",
            "eviction_delay": 4,
        }
    }
    options = ("--chat-template", str(FOLDER / "plain.jinja"))
    options += ("--additional-config", json.dumps(settings))
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(log, tiny_llada(), *options) as started:
        yield started


def completion(server: Server, prompt: str, **options: Any) -> str:
    given = {"prompt": prompt, "max_tokens": 256, "add_special_tokens": False, **options}
    return server.answer("completions", **given)["choices"][0]["text"]


def test_configurations(server: Server) -> None:
    """All configurations load, and a question asked through each gets the expected completion."""
    lines = (ROOT / "examples" / "lm_eval" / "recall.jsonl").read_text().splitlines()
    asked = [f"<|user|>{json.loads(line)['question']}<|eot_id|><|assistant|>" for line in lines]
    # A question whose answer differs between the paper's settings and the server's.
    question = next(
        text
        for text in asked
        if completion(server, text, **LLADA) != completion(server, text, temperature=0)
    )
    output = run_program(
        [
            *(str(PYTHON), str(FOLDER / "check.py"), "--question", question),
            *("--base-url", f"http://127.0.0.1:{server.client.base_url.port}/v1"),
            *("--model", "tiny", "--tokenizer", str(tiny_llada())),
        ],
        timeout=900,
    )
    answers = [json.loads(line) for line in output.splitlines() if line.startswith('{"config"')]
    assert {answer["config"]: answer["answer"] for answer in answers} == {
        name: completion(server, before + question, **options)
        for name, (before, options) in EXPECTED.items()
    }
