# SPDX-License-Identifier: Apache-2.0
"""Decoding as in research code: plain PyTorch, one request at a time.

Written from the published algorithms, as the benchmark's baseline: LLaDA (arXiv 2502.09992) and
Dream (2508.15487) without a cache, with Fast-dLLM's dual cache (2505.22618) and with Sparse-dLLM's
cache (2508.02558), each with fixed steps or with Fast-dLLM's threshold. As in the published
scripts, every forward computes the logits of all its rows over the whole vocabulary. LLaDA's
scripts take the softmax of all rows, in the model's dtype or, with the dual cache, in float64;
Dream's take it of the candidates' rows. The baseline is no slower than the scripts: it avoids work
of theirs that is not part of the method. Rotary tables are computed once, cached keys are kept
rotated, and a block ends as soon as it has no masks.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from baseline_network import Decoding, LayerCache, Network, Pass
from devices import peak_memory, reset_peak_memory
from programs import Job, num_cores, serve_model

#: The last of Dream's diffusion times.
DREAM_EPS = 1e-3


@dataclass
class Response:
    """The result of a request.

    Attributes:
        token_ids: The response.
        num_full: Number of passes over all positions.
        num_block: Number of passes over a block.
        cache_bytes: Maximum bytes that the caches held.
    """

    token_ids: list[int]
    num_full: int = 0
    num_block: int = 0
    cache_bytes: int = 0


@torch.inference_mode()
def generate(model: Network, prompt: list[int], decoding: Decoding) -> Response:
    """Denoise one response, block by block."""
    mask = model.shape.mask_token_id
    rule = LLaDARule(decoding) if model.shape.family == "llada" else DreamRule(decoding)
    ids = torch.tensor([prompt + [mask] * decoding.response], device=model.device)
    response = Response([])
    fill_step = {"none": -1, "dual": 0, "sparse": 1}[decoding.cache_policy]
    for number in range(decoding.num_blocks):
        start = len(prompt) + number * decoding.block_length
        block = (start, start + decoding.block_length)
        caches = [LayerCache() for _ in model.blocks]
        step = 0
        while (masked := ids[0, slice(*block)] == mask).any():
            if 0 <= fill_step < step:
                this, first, end = Pass(start, block, cached=True), start, block[1]
                response.num_block += 1
            else:
                this, first, end = Pass(0, block, fill=step == fill_step), 0, ids.shape[1]
                response.num_full += 1
            logits = model(ids[:, first:end], this, caches, decoding)[0]
            candidates = masked.nonzero().flatten() + start
            tokens, confidence = rule.rank(logits, candidates, first)
            chosen = rule.choose(confidence, step)
            ids[0, candidates[chosen]] = tokens[chosen]
            held = sum(cache.num_bytes for cache in caches)
            response.cache_bytes = max(response.cache_bytes, held)
            step += 1
            if decoding.threshold is None and step == decoding.steps_per_block:
                break
    response.token_ids = ids[0, len(prompt) :].tolist()
    return response


def _surest(confidence: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return the candidates that reach a threshold, at least the most confident one."""
    num_sure = int((confidence >= threshold).sum())
    return torch.topk(confidence, max(1, num_sure)).indices


class LLaDARule:
    """Fills in the most probable tokens first, equally many in each step."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding

    def rank(
        self, logits: torch.Tensor, candidates: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the candidates' tokens and confidences.

        Args:
            logits: Logits of the pass, ``[rows, vocab]``.
            candidates: Masked positions of the block.
            first: Position of the first row.
        """
        tokens = logits.argmax(dim=-1)
        if self.decoding.cache_policy == "dual":
            logits = logits.to(torch.float64)
        confidence = F.softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens[candidates - first], confidence[candidates - first]

    def choose(self, confidence: torch.Tensor, step: int) -> torch.Tensor:
        """Return which candidates are filled in."""
        decoding = self.decoding
        if decoding.threshold is not None:
            return _surest(confidence, decoding.threshold)
        quota, rest = divmod(decoding.block_length, decoding.steps_per_block)
        return torch.topk(confidence, quota + (step < rest)).indices


class DreamRule:
    """Fills in the tokens of lowest entropy first, a share of the candidates in each step.

    A row's logits predict the next position. With a cache, the first step of a block fills in only
    the block's first position, since later steps do not run the row before it.
    """

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        steps = decoding.steps_per_block
        times = torch.linspace(1, DREAM_EPS, steps + 1, dtype=torch.float32)
        self.shares = 1 - times[1:] / times[:-1]

    def rank(
        self, logits: torch.Tensor, candidates: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `LLaDARule.rank`; the first row also predicts its own position."""
        rows = (candidates - first - 1).clamp(min=0)
        probabilities = F.softmax(logits[rows], dim=-1)
        best, tokens = probabilities.max(dim=-1)
        if self.decoding.threshold is not None:
            return tokens, best
        return tokens, (probabilities * torch.log(probabilities + 1e-10)).sum(dim=-1)

    def choose(self, confidence: torch.Tensor, step: int) -> torch.Tensor:
        """Return which candidates are filled in."""
        decoding = self.decoding
        if step == 0 and decoding.cache_policy != "none":
            return torch.zeros(1, dtype=torch.long, device=confidence.device)
        if decoding.threshold is not None:
            return _surest(confidence, decoding.threshold)
        count = len(confidence)
        if step < decoding.steps_per_block - 1:
            count = int(count * self.shares[step])
        return torch.topk(confidence, count).indices


def _load(arguments: argparse.Namespace) -> tuple[Job, Any]:
    torch.set_num_threads(num_cores())
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    model = Network.load(arguments.model, dtype, device, arguments.dummy)
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "weights": weights}

    def handle(job: Job) -> Job:
        decoding = Decoding(job["response"], **job["settings"])
        reset_peak_memory(device)
        start = time.perf_counter()
        responses = [generate(model, prompt, decoding) for prompt in job["prompts"]]
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens": [response.token_ids for response in responses],
            "num_full": sum(response.num_full for response in responses),
            "num_block": sum(response.num_block for response in responses),
            "cache_bytes": max(response.cache_bytes for response in responses),
            # The device is done: reading the tokens has waited for it.
            "peak_memory": peak_memory(device),
        }

    return about, handle


if __name__ == "__main__":
    serve_model(__doc__, _load)
