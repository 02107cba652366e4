# SPDX-License-Identifier: Apache-2.0
"""Tables of the README and of docs/parameters.md match the code, and links have targets."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from vllm_sparse_dllm.cache.policies import POLICIES
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.frontend.admission import _NEUTRAL
from vllm_sparse_dllm.models.configs import (
    DREAM_ARCHITECTURE,
    LLADA_ARCHITECTURE,
    DreamConfig,
    LLaDAConfig,
    model_traits,
)
from vllm_sparse_dllm.settings import (
    CACHE_POLICIES,
    FIELDS,
    REMASKING_RULES,
    REQUEST_PREFIX,
    EngineSettings,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in (
        "*.md",
        "docs/*.md",
        "patches/*.md",
        "examples/**/*.md",
        "vllm_sparse_dllm/**/*.md",
    )
    for page in ROOT.glob(pattern)
)
PARAMETERS = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")


def table(name: str, page: str = README) -> list[dict[str, str]]:
    """Return the rows of the table that follows a ``<!-- table: name -->`` comment."""
    lines = page.partition(f"<!-- table: {name} -->\n")[2].splitlines()
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len(rows) > 2, f"there is no table {name}"
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]


def code(cell: str) -> str | None:
    """Return the name that a cell has in backticks, None if the cell is empty."""
    if not cell:
        return None
    match = re.fullmatch(r"`([^`]+)`", cell)
    assert match, f"not a name in backticks: {cell!r}"
    return match[1]


def in_json(value: Any) -> str:
    return "null" if value is None else str(value)


def test_settings() -> None:
    engine = EngineSettings()
    defaults = asdict(engine) | asdict(engine.decoding)
    expected = [
        (
            name if field.scope in ("both", "engine") else None,
            REQUEST_PREFIX + name if field.scope in ("both", "request") else None,
            field.allowed,
            in_json(defaults[name]),
        )
        for name, field in FIELDS.items()
    ]
    rows = [
        (
            code(row["engine setting"]),
            code(row["request parameter"]),
            row["allowed"],
            code(row["default"]),
        )
        for row in table("settings")
    ]
    assert rows == expected


def test_cache_policies() -> None:
    names = [code(row["policy"]) for row in table("policies")]
    assert names == list(CACHE_POLICIES) == list(POLICIES)


def test_unmasking_rules() -> None:
    names = [code(row["rule"]) for row in table("rules")]
    assert names == list(REMASKING_RULES) == list(RULES)


def test_parameters_are_all_that_vllm_has() -> None:
    """The table has every field of vLLM's three request types and no others."""
    of: dict[str, set[str]] = {"S": set(), "C": set(), "H": set()}
    rows = table("parameters", PARAMETERS)
    for row in rows:
        for letter in row["of"].split():
            of[letter].add(str(code(row["parameter"])))
    assert len(rows) == len({row["parameter"] for row in rows})
    assert of["S"] == {f for f in SamplingParams.__struct_fields__ if not f.startswith("_")}
    assert of["C"] == CompletionRequest.model_fields.keys()
    assert of["H"] == ChatCompletionRequest.model_fields.keys()
    assert {row["answer"] for row in rows} == {"honoured", "refused", "no effect"}


def test_refused_parameters() -> None:
    """The table and the code refuse the same `SamplingParams`, except for the same values."""
    rows = {
        code(row["parameter"]): re.findall(r"`([^`]+)`", row["how"].partition(")")[0])
        for row in table("parameters", PARAMETERS)
        if row["answer"] == "refused" and "S" in row["of"].split()
    }
    assert rows == {name: [repr(v) for v in neutral] for name, neutral in _NEUTRAL.items()}


def test_models() -> None:
    rules = {
        architecture: model_traits(config).default_remasking
        for architecture, config in {
            LLADA_ARCHITECTURE: LLaDAConfig(mask_token_id=1),
            DREAM_ARCHITECTURE: DreamConfig(mask_token_id=1),
        }.items()
    }
    assert {code(row["architecture"]): code(row["own rule"]) for row in table("models")} == rules


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    }
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in headings, f"{page} links to #{anchor}"
