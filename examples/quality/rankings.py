# SPDX-License-Identifier: Apache-2.0
"""Explore which keys to keep, beyond what the engine offers: plain PyTorch, one item at a time.

Compares rankings of keys, steps at which the cache is chosen, and keep ratios that differ by layer,
on items of the quality harness (by default of another seed than in docs/quality.md). A response is
one block, one token a step; all else is as published. Prints two tables per model: exact match ±
standard error, followed by the mean difference to ``none`` on the same items and its standard
error; and the shares of the question, and of what it asks about, that each layer kept.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluate import MODELS, is_model, is_right, model_path
from report import paired_difference, table
from tasks import MIN_LENGTH, RESPONSE, TASKS, Item, Vocabulary, held_out
from torch import Tensor
from tqdm import tqdm

from vllm_sparse_dllm.assets import embedded_models

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from baseline import DreamRule, LLaDARule
from baseline_network import Block, Decoding, LayerCache, Network, Pass, Shape

#: Positions at the end of a prompt that count as its question.
WINDOW = 16


@dataclass(frozen=True)
class View:
    """The input of a ranking: one layer in one full pass.

    Attributes:
        queries: ``[heads, L, head_size]``, rotated.
        keys: ``[heads, L, head_size]``, rotated, repeated for the heads of a group.
        prompt: Number of prompt positions, whose keys are ranked; the rest is the block.
        asking: Positions whose logits predict masks; Dream's are one before the masks.
    """

    queries: Tensor
    keys: Tensor
    prompt: int
    asking: Tensor

    @property
    def block(self) -> Tensor:
        """All positions of the block."""
        return torch.arange(self.prompt, self.queries.shape[1])

    def products(self, positions: Tensor) -> Tensor:
        """Return the published score with the mean query of these positions: ``[prompt]``."""
        query = self.queries[:, positions].mean(1, keepdim=True)
        return (query @ self.keys[:, : self.prompt].transpose(1, 2)).mean((0, 1))

    def attention(self, positions: Tensor) -> Tensor:
        """Return the mean attention of these positions to each key: ``[heads, prompt]``."""
        scale = self.keys.shape[-1] ** -0.5
        scores = self.queries[:, positions] @ self.keys.transpose(1, 2) * scale
        return scores.softmax(-1)[..., : self.prompt].mean(1)


#: Scores the prompt's keys; those with the highest scores are kept.
Ranking = Callable[[View], Tensor]


def paper(view: View) -> Tensor:
    """The published score: raw products with the block's mean query."""
    return view.products(view.block)


def paper_of_masks(view: View) -> Tensor:
    """As `paper`, with the queries of the remaining masks instead of the whole block."""
    return view.products(view.asking)


def attention(view: View) -> Tensor:
    """The engine's ``attention``: mean attention of the block, averaged over heads."""
    return view.attention(view.block).mean(0)


def attention_by_heads(view: View) -> Tensor:
    """As `attention`, with the maximum over heads."""
    return view.attention(view.block).amax(0)


def window(view: View) -> Tensor:
    """The engine's ``window``: attention of the prompt's end and the block; the end is kept."""
    return _window(view, view.block)


def window_of_masks(view: View) -> Tensor:
    """As `window`, with the queries of the remaining masks instead of the whole block."""
    return _window(view, view.asking)


def _window(view: View, positions: Tensor) -> Tensor:
    end = torch.arange(max(0, view.prompt - WINDOW), view.prompt)
    return with_the_end((view.attention(positions) + view.attention(end)).amax(0))


def with_the_end(scores: Tensor) -> Tensor:
    """Raise the scores of the prompt's end above all others."""
    scores = scores.clone()
    last = min(WINDOW, len(scores))
    scores[-last:] = scores.max() + torch.arange(1, 1 + last)
    return scores


def paper_and_end(view: View) -> Tensor:
    return with_the_end(paper(view))


@dataclass(frozen=True)
class Method:
    """A way to choose which keys are kept.

    Attributes:
        rank: The ranking; None for no cache.
        choices: Steps at which a full pass refills the cache; all steps before the first of them
            are full passes too.
        shares: Factors on the keep ratio of the first and of the last layer, interpolated linearly
            in between.
    """

    rank: Ranking | None
    choices: tuple[int, ...] = (1,)
    shares: tuple[float, float] = (1.0, 1.0)

    def share(self, layer: int, layers: int) -> float:
        first, last = self.shares
        return first + (last - first) * layer / max(1, layers - 1)


METHODS = {
    "none": Method(None),
    "published (`paper`)": Method(paper),
    "published, queries with masks to fill in": Method(paper_of_masks),
    f"published, the prompt's last {WINDOW} kept": Method(paper_and_end),
    "`attention`": Method(attention),
    "`attention`, maximum over heads": Method(attention_by_heads),
    "`window`": Method(window),
    "`window`, queries with masks to fill in": Method(window_of_masks),
    "published, chosen again at step 16": Method(paper, choices=(1, 16)),
    "published, chosen again at step 24": Method(paper, choices=(1, 24)),
    "published, again at step 24, queries with masks to fill in": Method(
        paper_of_masks, choices=(1, 24)
    ),
    "`window`, chosen again at step 24": Method(window, choices=(1, 24)),
    "published, 1.6 of the mean in the first layer to 0.4": Method(paper, shares=(1.6, 0.4)),
    "published, 0.4 of the mean in the first layer to 1.6": Method(paper, shares=(0.4, 1.6)),
    "`window`, 1.6 of the mean in the first layer to 0.4": Method(window, shares=(1.6, 0.4)),
    "`window`, 0.4 of the mean in the first layer to 1.6": Method(window, shares=(0.4, 1.6)),
}


@dataclass
class _Choice:
    """State shared by a network's layers: what to rank by, and what each of them kept."""

    method: Method = METHODS["none"]
    asking: Tensor = field(default_factory=lambda: torch.empty(0))
    #: Positions kept at the last choice, by layer.
    kept: dict[int, Tensor] = field(default_factory=dict)


class RankedBlock(Block):
    """A decoder layer that keeps the keys that a method ranks highest."""

    def __init__(self, shape: Shape, number: int, choice: _Choice) -> None:
        """``number`` counts layers from 0."""
        super().__init__(shape)
        self.number, self.layers, self.choice = number, shape.layers, choice

    def _select(self, q: Tensor, k: Tensor, block: tuple[int, int], decoding: Decoding) -> Tensor:
        method, prompt = self.choice.method, block[0]
        assert method.rank is not None
        keys = k[0].repeat_interleave(self.heads // self.kv_heads, dim=0)
        scores = method.rank(View(q[0], keys, prompt, self.choice.asking))[None]
        kernel = decoding.kernel_size
        scores = F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
        share = method.share(self.number, self.layers)
        keep = int(prompt * decoding.keep_ratio * share)
        self.choice.kept[self.number] = kept = torch.topk(scores, keep).indices[0]
        return kept


@dataclass
class Cell:
    """Results of one method on the items of one task.

    Attributes:
        right: For each item, whether its answer was right.
        question: For each item, the share of the question that each layer kept, if any chose keys.
        pivots: The same for what the question asks about.
    """

    right: list[bool] = field(default_factory=list)
    question: list[list[float]] = field(default_factory=list)
    pivots: list[list[float]] = field(default_factory=list)

    def accuracy(self, none: Cell | None) -> str:
        number = len(self.right)
        mean = sum(self.right) / number
        text = f"{mean:.3f} ± {math.sqrt(mean * (1 - mean) / number):.3f}"
        if none is None:
            return text
        difference, error, _ = paired_difference(self.right, none.right)
        return f"{text} ({difference:+.3f} ± {error:.3f})"

    def kept(self) -> str:
        """Return the means over items, layer by layer."""
        parts = (torch.tensor(part).mean(0).tolist() for part in (self.question, self.pivots))
        return " | ".join(" ".join(f"{share:.2f}" for share in part) for part in parts)


class Explorer:
    """Answers items of one checkpoint by any method, in float32."""

    def __init__(self, path: Path) -> None:
        self.vocabulary = Vocabulary(path)
        self.network = Network.load(path, torch.float32)
        self.choice = _Choice()
        for number, block in enumerate(self.network.blocks):
            ranked = RankedBlock(self.network.shape, number, self.choice).requires_grad_(False)
            ranked.load_state_dict(block.state_dict(), assign=True)
            self.network.blocks[number] = ranked

    @torch.inference_mode()
    def respond(self, prompt: list[int], method: Method, keep_ratio: float) -> list[int]:
        """Return the response's tokens."""
        network, policy = self.network, "none" if method.rank is None else "sparse"
        decoding = Decoding(RESPONSE, policy, RESPONSE, keep_ratio=keep_ratio)
        shift = int(network.shape.family == "dream")
        rule = (DreamRule if shift else LLaDARule)(decoding)
        start, mask = len(prompt), network.shape.mask_token_id
        ids = torch.tensor([prompt + [mask] * RESPONSE])
        block = (start, start + RESPONSE)
        caches = [LayerCache() for _ in network.blocks]
        self.choice.method = method
        self.choice.kept.clear()
        step = 0
        while (masked := ids[0, start:] == mask).any():
            candidates = masked.nonzero().flatten() + start
            self.choice.asking = candidates - shift
            fill = policy == "sparse" and step in method.choices
            if policy == "sparse" and step > method.choices[0] and not fill:
                this, first = Pass(start, block, cached=True), start
            else:
                this, first = Pass(0, block, fill=fill), 0
            logits = network(ids[:, first:], this, caches, decoding)[0]
            tokens, confidence = rule.rank(logits, candidates, first)
            chosen = rule.choose(confidence, step)
            ids[0, candidates[chosen]] = tokens[chosen]
            step += 1
        return ids[0, start:].tolist()

    def answer(self, items: list[Item], method: Method, keep_ratio: float) -> Cell:
        cell = Cell()
        for item in tqdm(items, leave=False):
            response = self.respond(self.vocabulary.encode(item.prompt), method, keep_ratio)
            cell.right.append(is_right(item, response, self.vocabulary))
            for parts, positions in ((cell.question, item.question), (cell.pivots, item.pivots)):
                wanted = torch.tensor(positions)
                kept = (self.choice.kept[layer] for layer in sorted(self.choice.kept))
                parts.append([torch.isin(wanted, one).float().mean().item() for one in kept])
        return cell


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", action="append", help=f"{MODELS}; may be repeated (default: all of those named)")
    add("--items", type=int, default=64, help="of a cell; default: %(default)s")
    add("--length", type=int, default=256, help="of prompts; default: %(default)s")
    add("--tasks", nargs="+", choices=sorted(TASKS), default=["retrieval", "copy"])
    add("--keep", nargs="+", type=float, default=[0.5, 0.3], help="ratios; default: 0.5 0.3")
    add("--only", metavar="TEXT", help="beside none, only methods whose names have this in them")
    add("--seed", type=int, default=4, help="of the items; default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.items < 1:
        parser.error(f"--items must be at least 1, got {arguments.items}")
    if arguments.length < MIN_LENGTH:
        parser.error(f"--length must be at least {MIN_LENGTH}, got {arguments.length}")
    arguments.methods = {
        name: method
        for name, method in METHODS.items()
        if method.rank is None or (arguments.only or "") in name
    }
    if len(arguments.methods) == 1:
        parser.error(f"--only must be in the name of a method, got {arguments.only!r}")
    shares = [share for method in arguments.methods.values() for share in method.shares]
    least, most = 1 / (arguments.length * min(shares)), 1 / max(shares)
    if not all(least <= ratio <= most for ratio in arguments.keep):
        # A layer must keep at least one key and at most all.
        parser.error(f"--keep must be from {least:g} to {most:g}, got {arguments.keep}")
    arguments.model = arguments.model or embedded_models()
    for model in arguments.model:
        if not is_model(model):
            parser.error(f"--model must be {MODELS}, got {model!r}")
        try:
            longest = Shape.of(Path(model_path(model))).positions - RESPONSE
        except ValueError as error:
            parser.error(f"--model {model}: {error}")
        if arguments.length > longest:
            parser.error(f"--length must be at most {longest} with {model}, got {arguments.length}")
    return arguments


def explore(explorer: Explorer, arguments: argparse.Namespace) -> None:
    """Print a model's tables; the second one is for the first keep ratio only."""
    ratios: list[float] = arguments.keep
    titles = [f"{task}, keep {ratio:g}" for task in arguments.tasks for ratio in ratios]
    print(table(["", *titles], []), end="")
    bare: dict[str, Cell] = {}
    kept = []
    for name, method in arguments.methods.items():
        cells: list[Cell] = []
        for task in arguments.tasks:
            items = held_out(task, arguments.length, arguments.items, arguments.seed)
            if method.rank is None:
                bare[task] = explorer.answer(items, method, 1.0)
                cells += [bare[task]] * len(ratios)
            else:
                cells += [explorer.answer(items, method, ratio) for ratio in ratios]
        tasks = [task for task in arguments.tasks for _ in ratios]
        none = [None if method.rank is None else bare[task] for task in tasks]
        # Print row by row, as a table takes minutes.
        print(f"| {' | '.join((name, *map(Cell.accuracy, cells, none)))} |", flush=True)
        if method.rank is not None:
            kept.append([name, *(cell.kept() for cell in cells[:: len(ratios)])])
    titles = [f"{task}: {part}" for task in arguments.tasks for part in ("question", "asked about")]
    print(f"\nKept at {ratios[0]:g}, by layer:\n")
    print(table(["", *titles], kept), end="")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    for model in arguments.model:
        print(f"\n**{Path(model).name}**, prompts of {arguments.length}, n = {arguments.items}\n")
        explore(Explorer(Path(model_path(model))), arguments)


if __name__ == "__main__":
    # With matrices so small, threads would only wait for each other.
    torch.set_num_threads(1)
    main()
