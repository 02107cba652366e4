# SPDX-License-Identifier: Apache-2.0
"""What explores further rankings agrees with the reference where that has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.reference import generate
from tests.reference import load as load_model
from tests.scripts import EXAMPLES, load
from vllm_sparse_dllm.assets import embedded_model

LENGTH = 96

rankings, tasks = load(EXAMPLES / "quality", "rankings", "tasks")


@pytest.fixture(scope="module", params=["tiny-llada", "tiny-dream"])
def path(request: pytest.FixtureRequest) -> Path:
    return Path(embedded_model(request.param))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("none", {"cache_policy": "none"}),
        ("published (`paper`)", {"cache_policy": "sparse"}),
        ("`window`", {"cache_policy": "sparse", "saliency": "window"}),
    ],
)
def test_known_methods(path: Path, name: str, options: dict[str, str]) -> None:
    explorer, model = rankings.Explorer(path), load_model(path)
    for task in ("copy", "retrieval"):
        (item,) = tasks.held_out(task, LENGTH, 1, seed=5)
        prompt = explorer.vocabulary.encode(item.prompt)
        expected = generate(
            model,
            prompt,
            tasks.RESPONSE,
            block_length=tasks.RESPONSE,
            steps=tasks.RESPONSE,
            keep_ratio=0.4,
            ignore_eos=True,
            **options,
        )
        assert explorer.respond(prompt, rankings.METHODS[name], 0.4) == expected


def test_shares_of_layers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over layers is what the ratio says, and choosing again fills the caches anew."""
    explorer, kept = rankings.Explorer(path), []
    select = rankings.RankedBlock._select

    def recording(self: object, *args: object) -> torch.Tensor:
        positions = select(self, *args)
        kept.append(len(positions))
        return positions

    monkeypatch.setattr(rankings.RankedBlock, "_select", recording)
    (item,) = tasks.held_out("copy", LENGTH, 1, seed=5)
    method = rankings.Method(rankings.paper, choices=(1, 9), shares=(1.5, 0.5))
    explorer.respond(explorer.vocabulary.encode(item.prompt), method, 0.5)
    assert kept == [72, 56, 40, 24] * 2


def test_queries_of_masks_only() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 2, 24, 8, generator=generator)
    masked = torch.arange(8) % 3 == 0
    view = rankings.View(queries, keys, 16, masked)
    expected = torch.stack(
        [sum(queries[h, 16:][masked].mean(0) @ keys[h, j] for h in range(2)) / 2 for j in range(16)]
    )
    torch.testing.assert_close(rankings.paper_of_masks(view), expected)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model tiny-llada --items 2 --length 48 --tasks copy --keep 1 --only attention"
    rankings.main(arguments.split())
    accuracy, kept = capsys.readouterr().out.split("Kept at 1")
    methods = [name for name in rankings.METHODS if "attention" in name]
    found = re.findall(r"^\| ([^|]+) \| [01][^|]* ± [^|]* \|$", accuracy, flags=re.MULTILINE)
    assert found == ["none", *methods]
    assert accuracy.count("(+0.000 ± 0.000)") == len(methods)
    for name in methods:
        assert f"| {name} | {'1.00 ' * 4}| {'1.00 ' * 4}|" in kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--items 0", "--items must be at least 1, got 0"),
        ("--length 3", "--length must be at least"),
        ("--keep 0.5 1.5", "--keep must be above 0 and at most 1"),
        ("--model nothing", "--model must be one of"),
        ("--only nothing", "--only must be in the name of a method"),
    ],
)
def test_bad_arguments(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rankings.parse_arguments(options.split())
    assert message in capsys.readouterr().err
