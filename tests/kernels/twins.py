# SPDX-License-Identifier: Apache-2.0
"""What the kernels compute, in plain PyTorch; in float64 where the kernels round."""

from __future__ import annotations

import math

import numpy as np
import torch

from vllm_sparse_dllm.kernels.plain import key_scores, max_pool

__all__ = ["attention", "key_scores", "max_pool", "paged_attention", "statistics", "write_rows"]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return ``[n, heads, d]`` attention of queries over ``[m, kv_heads, d]`` keys."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    weights = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", torch.softmax(weights, dim=-1), v)


def paged_attention(
    q: torch.Tensor,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
    query_lengths: np.ndarray,
    key_lengths: np.ndarray,
    page_table: np.ndarray,
    page_size: int,
) -> torch.Tensor:
    """Return the attention of each sequence's queries over the first slots of its pages."""
    parts, first = [], 0
    for queries, keys, pages in zip(query_lengths, key_lengths, page_table, strict=True):
        slots = torch.from_numpy((pages[:, None] * page_size + np.arange(page_size)).reshape(-1))
        slots = slots[:keys].to(q.device)
        own = q[first : first + queries]
        parts.append(attention(own, key_slots[slots], value_slots[slots]))
        first += int(queries)
    return torch.cat(parts)


def write_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
    entries: torch.Tensor | None = None,
    gap: tuple[int, int] = (0, 0),
) -> None:
    """Copy rows one by one; arguments are those of `kernels.pages.write_rows`."""
    for number, slot in enumerate(slots.tolist()):
        row = number if entries is None else int(entries[number])
        if entries is not None and row >= gap[0]:
            row += gap[1]
        if slot >= 0:
            key_slots[slot] = keys[row]
            value_slots[slot] = values[row]


def statistics(logits: torch.Tensor, mask_token_id: int) -> dict[str, torch.Tensor]:
    """Return the statistics that the rules use, from float64 probabilities."""
    wide = logits.double()
    probabilities = torch.softmax(wide, dim=-1)
    allowed = wide.clone()
    allowed[:, mask_token_id] = -math.inf
    tokens = allowed.argmax(dim=-1)
    two = torch.topk(probabilities, 2, dim=-1).values
    return {
        "tokens": tokens,
        "probability": probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),
        "margin": two[:, 0] - two[:, 1],
        "negative_entropy": (probabilities * torch.log(probabilities + 1e-10)).sum(dim=-1),
    }
