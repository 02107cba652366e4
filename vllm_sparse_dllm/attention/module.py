# SPDX-License-Identifier: Apache-2.0
"""Bidirectional attention of one layer, which also fills and reduces caches."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.attention.plan import Eviction, Fill, ForwardPlan
from vllm_sparse_dllm.cache.saliency import SALIENCIES, SaliencyInputs
from vllm_sparse_dllm.cache.selection import select_entries


class BidirectionalAttention(nn.Module):
    """Attention of a step's cached and full sequences; holds no weights.

    Args:
        layer_index: 0-based layer.
        shape: Heads of this rank.
        total_heads: Query heads over all ranks; saliencies may average over them.
    """

    def __init__(self, layer_index: int, shape: AttentionShape, total_heads: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.shape = shape
        self.total_heads = total_heads

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: ForwardPlan,
        last: bool,
    ) -> torch.Tensor:
        """Attend, and fill or reduce the caches that the plan names.

        Args:
            q: ``[tokens, heads, head_size]`` rotated queries.
            k: ``[tokens, kv_heads, head_size]`` rotated keys.
            v: ``[tokens, kv_heads, head_size]`` values.
            plan: The step's plan.
            last: Whether this is the last layer, which computes only ``plan.last_rows``.

        Returns:
            ``[rows, heads * head_size]`` for all tokens, in the last layer for ``last_rows``.
        """
        backend = plan.backend
        queries = q.index_select(0, plan.last_rows) if last else q
        allocate = torch.zeros if plan.padded else torch.empty
        output = allocate(queries.shape, dtype=q.dtype, device=q.device)
        num_cached_tokens = num_cached_rows = 0
        if plan.cached is not None:
            cached = plan.cached
            num_cached_tokens = cached.num_tokens
            num_cached_rows = plan.num_last_cached if last else num_cached_tokens
            backend.write(
                self.layer_index,
                k[:num_cached_tokens],
                v[:num_cached_tokens],
                cached.fresh_slots_of(self.layer_index),
            )
            if num_cached_rows:
                backend.attend_paged(
                    self.layer_index,
                    queries[:num_cached_rows],
                    output[:num_cached_rows],
                    cached.last_plan if last else cached.plan_of(self.layer_index),
                )
            for eviction in plan.evictions:
                self._evict(q, k, eviction, backend)
        if plan.full is not None:
            if num_cached_rows < queries.shape[0]:
                backend.attend_full(
                    queries[num_cached_rows:],
                    k[num_cached_tokens:],
                    v[num_cached_tokens:],
                    output[num_cached_rows:],
                    plan.full.last_plan if last else plan.full.plan,
                )
            for fill in plan.fills:
                self._fill(q, k, v, fill, backend)
        return output.view(output.shape[0], -1)

    def _fill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        fill: Fill,
        backend: AttentionBackend,
    ) -> None:
        first = fill.first_token
        k = k[first : first + fill.length]
        v = v[first : first + fill.length]
        layer = self.layer_index
        if fill.selection is None:
            offset = 0
            for start, end in fill.candidates:
                rows = slice(offset, offset + end - start)
                if end > start:
                    backend.write(layer, k[start:end], v[start:end], fill.slots[rows])
                if fill.positions is not None:
                    fill.positions[layer, rows] = np.arange(start, end)
                offset += end - start
            fill.num_kept[layer] = offset
            return
        if fill.selection.keep == 0:
            fill.num_kept[layer] = 0
            return
        inputs = SaliencyInputs(
            layer=layer,
            queries=q[first : first + fill.length],
            first_query=0,
            keys=k,
            rows=fill.candidates,
            candidates=fill.candidates,
            fresh_keys=None,
            canvas=fill.canvas,
            total_heads=self.total_heads,
            kernels=backend.selection,
        )
        saliency = SALIENCIES[fill.selection.saliency].score(inputs)
        block_start, block_end = fill.canvas.block
        kept = select_entries(saliency, fill.selection, backend.selection)
        num_kept = kept.shape[0]
        # The candidates leave out the block: those after it are shifted by its length.
        block_length = block_end - block_start
        backend.move(layer, k, v, kept, fill.slots[:num_kept], (block_start, block_length))
        fill.num_kept[layer] = num_kept
        if fill.positions is not None:
            positions = kept.cpu().numpy()
            fill.positions[layer, :num_kept] = positions + block_length * (positions >= block_start)

    def _evict(
        self, q: torch.Tensor, k: torch.Tensor, eviction: Eviction, backend: AttentionBackend
    ) -> None:
        layer, first = self.layer_index, eviction.first_token
        num_kept = 0
        kept = eviction.slots[:0]
        if eviction.selection.keep:
            keys = backend.read_keys(layer, eviction.slots)
            start, end = eviction.canvas.block
            inputs = SaliencyInputs(
                layer=layer,
                queries=q[first : first + end - start],
                first_query=start,
                keys=keys,
                rows=((0, keys.shape[0]),),
                candidates=eviction.candidates,
                fresh_keys=k[first : first + end - start],
                canvas=eviction.canvas,
                total_heads=self.total_heads,
                kernels=backend.selection,
            )
            saliency = SALIENCIES[eviction.selection.saliency].score(inputs)
            kept = select_entries(saliency, eviction.selection, backend.selection)
            num_kept = kept.shape[0]
            backend.write(
                layer,
                keys.index_select(0, kept),
                backend.read_values(layer, eviction.slots.index_select(0, kept)),
                eviction.slots[:num_kept],
            )
        eviction.num_kept[layer] = num_kept
        if eviction.positions is not None:
            own = eviction.positions[layer]
            own[:num_kept] = own[kept.cpu().numpy()]
            own[num_kept:] = -1
