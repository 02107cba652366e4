# SPDX-License-Identifier: Apache-2.0
"""Program: offline answers to compare the server's with, one request at a time.

``python -m tests.e2e.offline IN OUT``: IN is a JSON list of ``{"prompt": [ids], "options": {}}``,
with options named as in an HTTP request; OUT gets a list of the completions of each request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e.server import CACHE_BYTES, run_warm, tiny_llada


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate options into vLLM's parameters and the plugin's."""
    extra = {name: value for name, value in options.items() if name.startswith("diffusion_")}
    return {name: value for name, value in options.items() if name not in extra}, extra


def answer_all(requests: list[dict[str, Any]], folder: Path) -> list[list[dict[str, Any]]]:
    """Run the program on requests, in a process of its own."""
    given, found = folder / "requests.json", folder / "answers.json"
    given.write_text(json.dumps(requests))
    # In a single process; the server covers the multi-process engine.
    run_warm(
        ["-m", "tests.e2e.offline", str(given), str(found)],
        folder / "offline.log",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    return json.loads(found.read_text())


def main(given: Path, found: Path) -> None:
    """Read requests from one file and write their answers to another."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(tiny_llada()),
        dtype="float32",
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=True,
    )
    answers = []
    for request in json.loads(given.read_text()):
        options, extra = split(request["options"])
        params = SamplingParams(**{"temperature": 0.0, **options}, extra_args=extra or None)
        prompt = {"prompt_token_ids": request["prompt"]}
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        answers.append(
            [
                {
                    "tokens": list(o.token_ids),
                    "text": o.text,
                    "finish_reason": o.finish_reason,
                    "stop_reason": o.stop_reason,
                    "logprobs": None
                    if o.logprobs is None
                    else [{str(t): p.logprob for t, p in at.items()} for at in o.logprobs],
                }
                for o in output.outputs
            ]
        )
    found.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
