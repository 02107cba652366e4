# SPDX-License-Identifier: Apache-2.0
"""Attention by xFormers: block-diagonal masks over whole sequences, paged ones over pages.

A mask also keeps its lengths on the host and takes several copies to the device, so there are no
static plans and no CUDA graphs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.slots import ZeroedSlotBackend, why_not_half_on_cuda
from vllm_sparse_dllm.transfer import HostArrays

_LIBRARY = "xformers.ops.fmha"
#: Modules of the library whose operators may be able to read pages, the fastest first.
_PAGED_OPERATORS = ("flash3", "flash", "triton_splitk")


@dataclass(frozen=True)
class _Plan:
    """A mask, or None where there are no queries."""

    mask: Any


class XFormersBackend(ZeroedSlotBackend):
    """`memory_efficient_attention`, over whole sequences with the operator that xFormers prefers.

    Its preference for pages depends on the step's shapes and may be an operator that cannot read
    pages of this size; so the first operator that can is determined once, at start, and requested
    explicitly.

    Raises:
        ValueError: If no operator runs here.
    """

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, page_size, dtype, device)
        self._library = importlib.import_module(_LIBRARY)
        self._group = shape.num_heads // shape.num_kv_heads
        self._paged_operator = self._try_operators()

    @classmethod
    def why_not(
        cls, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        if (reason := why_not_half_on_cuda(dtype, device)) is not None:
            return reason
        if find_spec("xformers") is None:
            return 'the package is not installed (pip install "vllm-sparse-dllm[xformers]")'
        return None

    def _try_operators(self) -> Any:
        """Try attention over keys and over a page, and return the operator to use for pages."""
        shape = self.shape
        two, page = np.array([2]), np.array([self.page_size])
        query = torch.zeros(
            2, shape.num_heads, shape.head_size, dtype=self.dtype, device=self.device
        )
        keys = query.new_zeros(self.page_size, shape.num_kv_heads, shape.head_size)
        try:
            self._run(query, keys, keys, query.clone(), self.plan_full(two, page).mask, None)
        except NotImplementedError as error:
            raise ValueError(
                f"attention_backend xformers cannot run a full pass here: {error}"
            ) from error
        mask = self.plan_paged(two, page, np.zeros((1, 1), dtype=np.int64)).mask
        reasons = []
        for name in _PAGED_OPERATORS:
            operator = getattr(getattr(self._library, name, None), "FwOp", None)
            if operator is None:
                continue
            try:
                self._run(query, keys, keys, query.clone(), mask, operator)
            except Exception as error:
                # An operator whose kernel does not compile with this Triton is unusable too.
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                return operator
        raise ValueError(
            f"attention_backend xformers cannot read pages of block_size={self.page_size} here; "
            f"its split-K kernel wants a multiple of 64: {' '.join(reasons)}"
        )

    def _run(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        mask: Any,
        operator: Any,
    ) -> None:
        q, k, v = (tensor.unsqueeze(0) for tensor in (queries, keys, values))
        if self._group > 1:
            # Group the query heads that share a key head.
            q = q.unflatten(2, (self.shape.num_kv_heads, self._group))
            k, v = (part.unsqueeze(3).expand(-1, -1, -1, self._group, -1) for part in (k, v))
        result = self._library.memory_efficient_attention_forward(
            q, k, v, attn_bias=mask, scale=self.scale, op=operator
        )
        output.copy_(result.reshape(output.shape))

    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _Plan:
        # A sequence without queries is a run of keys that no query attends to.
        if not query_lengths.any():
            return _Plan(None)
        mask = self._library.attn_bias.BlockDiagonalMask.from_seqlens(
            query_lengths.tolist(), key_lengths.tolist(), device=self.device
        )
        # With 1 and grouped heads, PyTorch's kernel assumes that every sequence has a query.
        mask.q_seqinfo.max_seqlen = max(2, mask.q_seqinfo.max_seqlen)
        return _Plan(mask)

    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        if plan.mask is not None:
            self._run(queries, keys, values, output, plan.mask, None)

    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _Plan:
        active = query_lengths > 0
        if not active.any():
            return _Plan(None)
        table = torch.from_numpy(np.ascontiguousarray(page_table[active], dtype=np.int32))
        mask = self._library.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=query_lengths[active].tolist(),
            kv_seqlen=key_lengths[active].tolist(),
            block_tables=table.to(self.device, non_blocking=True),
            page_size=self.page_size,
            device=self.device,
        )
        return _Plan(mask)

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        if plan.mask is not None:
            keys, values = self._slots[layer]
            self._run(queries, keys, values, output, plan.mask, self._paged_operator)
