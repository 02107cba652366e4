# SPDX-License-Identifier: Apache-2.0
"""The viewer is a single page: it loads nothing else, and reads the fields of a trace.

`tests/e2e/test_viewer.py` drives it in a browser, where there is one.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vllm_sparse_dllm.engine.trace import TRACE, CommitTrace, finish, merge

PAGE = (Path(__file__).parents[2] / "examples" / "viewer" / "index.html").read_text("utf-8")


class _Elements(HTMLParser):
    """Collects the attributes of all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs


@pytest.fixture(scope="module")
def attributes() -> list[tuple[str, str | None]]:
    parser = _Elements()
    parser.feed(PAGE)
    return parser.attributes


def test_it_loads_nothing(attributes: list[tuple[str, str | None]]) -> None:
    assert not {"src", "data", "action"} & {name for name, _ in attributes}
    assert {value for name, value in attributes if name == "href"} == {"data:,"}  # no icon
    assert "@import" not in PAGE and "url(" not in PAGE
    assert set(re.findall(r"https?://[^\s\"'`]+", PAGE)) == {
        "http://localhost:8000",
        "http://www.w3.org/2000/svg",  # a namespace
    }


def test_its_script_knows_its_elements(attributes: list[tuple[str, str | None]]) -> None:
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"\$\(\"(\w+)\"\)", PAGE)) <= set(ids)


def test_it_reads_the_fields_of_a_trace() -> None:
    record = CommitTrace(response_length=1, with_kept=True)
    record.record_cache("refresh", (0, 1), [])
    trace: dict[str, object] = {}
    merge(trace, record.take(1))
    finish(trace, 1)
    read = set(re.findall(r"\btrace\.(\w+)", PAGE)) - {"md"}  # docs/trace.md
    assert f"choice.{TRACE}" in PAGE
    assert read == trace.keys()
    refresh = set(re.findall(r"\b(?:last|refresh)\.(\w+)", PAGE))
    assert refresh | {"kind"} == {"step", "kind", "block", "kept"} and "entry.kind" in PAGE
