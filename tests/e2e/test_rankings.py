# SPDX-License-Identifier: Apache-2.0
"""The script that explores rankings agrees with the reference on those that both have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.reference import generate
from tests.reference import load as load_model
from tests.reference.decode import WINDOW, worth
from tests.scripts import EXAMPLES, load
from vllm_sparse_dllm.assets import embedded_model

LENGTH = 96

rankings, tasks = load(EXAMPLES / "quality", "rankings", "tasks")


@pytest.fixture(scope="module", params=["tiny-llada", "tiny-dream"])
def path(request: pytest.FixtureRequest) -> Path:
    return Path(embedded_model(request.param))


def naive(saliency: str, view: Any) -> torch.Tensor:
    """Return the reference's scores for the same queries and keys."""
    block, others = view.queries[:, view.block], torch.arange(view.prompt)
    end = view.queries[:, max(0, view.prompt - WINDOW) : view.prompt]
    return worth(saliency, [block, end], view.keys, others, view.prompt)


@pytest.mark.parametrize(
    ("name", "saliency"),
    [("published (`paper`)", "paper"), ("`attention`", "attention"), ("`window`", "window")],
)
def test_known_methods(path: Path, name: str, saliency: str) -> None:
    """Tokens and scores equal the reference's, and the highest scores are kept.

    The positions that the reference keeps may differ: it may first commit another of several
    equally sure positions, and may choose differently between equal scores.
    """
    explorer, method, views = rankings.Explorer(path), rankings.METHODS[name], []

    def recording(view: Any) -> torch.Tensor:
        views.append((view, method.rank(view)))
        return views[-1][1]

    (item,) = tasks.held_out("copy", LENGTH, 1, seed=5)
    prompt = explorer.vocabulary.encode(item.prompt)
    sizes = dict.fromkeys(("block_length", "steps"), tasks.RESPONSE)
    expected = generate(
        load_model(path),
        prompt,
        tasks.RESPONSE,
        keep_ratio=0.4,
        saliency=saliency,
        ignore_eos=True,
        **sizes,
    )
    assert explorer.respond(prompt, rankings.Method(recording), 0.4) == expected
    # `window` raises the prompt's end above all others, but to other scores than the reference.
    ranked = len(prompt) - (WINDOW if saliency == "window" else 0)
    assert len(views) == len(explorer.network.blocks)
    for number, (view, scores) in enumerate(views):
        torch.testing.assert_close(scores[:ranked], naive(saliency, view)[:ranked])
        assert (scores[ranked:] > scores[:ranked].max()).all()
        pooled = F.max_pool1d(scores[None], 3, stride=1, padding=1)[0]
        kept = torch.zeros(len(prompt), dtype=torch.bool)
        kept[explorer.choice.kept[number]] = True
        assert kept.sum() == int(0.4 * len(prompt))
        assert pooled[kept].min() >= pooled[~kept].max()


def test_without_a_cache(path: Path) -> None:
    explorer = rankings.Explorer(path)
    (item,) = tasks.held_out("copy", LENGTH, 1, seed=5)
    prompt = explorer.vocabulary.encode(item.prompt)
    expected = generate(
        load_model(path), prompt, tasks.RESPONSE, cache_policy="none", ignore_eos=True
    )
    assert explorer.respond(prompt, rankings.METHODS["none"], 1.0) == expected
    assert not explorer.choice.kept


def test_shares_of_layers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over layers equals the keep ratio, and a second choice refills the caches."""
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


def test_a_second_choice_replaces_the_first(path: Path) -> None:
    """The second choice sees the masks that are left by then, and only what it keeps stays."""
    explorer = rankings.Explorer(path)
    (item,) = tasks.held_out("copy", LENGTH, 1, seed=5)
    prompt = explorer.vocabulary.encode(item.prompt)
    calls = len(explorer.network.blocks)
    asked: list[int] = []

    def late(view: Any) -> torch.Tensor:
        """Score the start of the prompt highest, but in the second choice its end."""
        asked.append(len(view.asking))
        positions = torch.arange(view.prompt, dtype=torch.float32)
        return -positions if len(asked) <= calls else positions

    explorer.respond(prompt, rankings.Method(late, choices=(1, 9)), 0.25)
    # Dream's first two steps commit one token and none.
    assert asked == [31] * calls + [23 + (explorer.network.shape.family == "dream")] * calls
    kept = [explorer.choice.kept[number].tolist() for number in range(calls)]
    assert all(set(one) == set(range(LENGTH - LENGTH // 4, LENGTH)) for one in kept)


def test_rankings_look_at_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 2, 24, 8, generator=generator)
    asking = torch.tensor([15, 18, 21])
    view = rankings.View(queries, keys, 16, asking)
    products = [
        sum(queries[h, asking].mean(0) @ keys[h, j] for h in range(2)) / 2 for j in range(16)
    ]
    torch.testing.assert_close(rankings.paper_of_masks(view), torch.stack(products))
    shares = torch.stack([(queries[h, 16:] @ keys[h].T / 8**0.5).softmax(-1) for h in range(2)])
    by_heads = shares.mean(1)[:, :16]
    torch.testing.assert_close(rankings.attention(view), by_heads.mean(0))
    torch.testing.assert_close(rankings.attention_by_heads(view), by_heads.amax(0))


def test_cells() -> None:
    none = rankings.Cell([True, True, True, False])
    assert none.accuracy(None) == "0.750 ± 0.217"
    # Differences of -1, -1, 0 and 1: their mean, and the error of it.
    other = rankings.Cell([False, False, True, True])
    assert other.accuracy(none) == "0.500 ± 0.250 (-0.250 ± 0.415)"


def test_what_was_kept(path: Path) -> None:
    """Keeping the first half of a prompt keeps nothing of the question, which is at its end."""
    explorer = rankings.Explorer(path)
    items = tasks.held_out("copy", LENGTH, 2, seed=5)
    first = rankings.Method(lambda view: -torch.arange(view.prompt, dtype=torch.float32))
    cell = explorer.answer(items, first, 0.5)
    half = LENGTH // 2 + 1  # The max-pool keeps one more.
    listed = [sum(place < half for place in item.pivots) / len(item.pivots) for item in items]
    layers = len(explorer.network.blocks)
    assert cell.question == [[0.0] * layers] * 2
    assert cell.pivots == [pytest.approx([part] * layers, abs=0.2) for part in listed]
    assert " ".join(["0.00"] * layers) + " | " in cell.kept()


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
        ("--length 2040", "--length must be at most 2016 with tiny-llada, got 2040"),
        ("--length 96 --keep 0.5 1.5", "--keep must be from 0.0260417 to 0.625, got [0.5, 1.5]"),
        ("--keep 0", "--keep must be from"),
        ("--model nothing", "--model must be one of"),
        ("--only nothing", "--only must be in the name of a method"),
        ("--only none", "--only must be in the name of a method"),
    ],
)
def test_bad_arguments(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rankings.parse_arguments(["--model", "tiny-llada", *options.split()])
    assert message in capsys.readouterr().err
