# SPDX-License-Identifier: Apache-2.0
"""Which cache entries a block keeps, by their saliency (Sparse-dLLM, arXiv 2508.02558)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_sparse_dllm.kernels.plain import PLAIN, SelectionKernels


@dataclass(frozen=True)
class Selection:
    """How entries are chosen by saliency.

    Attributes:
        keep: Entries to keep, at most as many as there are.
        kernel_size: Odd width of the max-pool over saliency.
        run_length: 1 to select single entries; more to select ``ceil(keep / run_length)`` whole
            runs of that many entries, ranked by their maxima (the last run may be short).
        saliency: Name of what ranks the entries, a key of `SALIENCIES`.
    """

    keep: int
    kernel_size: int
    run_length: int
    saliency: str = "paper"


def select_entries(
    saliency: torch.Tensor, selection: Selection, kernels: SelectionKernels = PLAIN
) -> torch.Tensor:
    """Choose entries by max-pooled saliency.

    Ties affect results, and how `torch.topk` breaks them depends on the whole vector: it is
    called on exactly the ``[1, n]`` vector, neither padded nor sorted.

    Args:
        saliency: ``[n]``.
        selection: How to choose, with 1 <= keep <= n.
        kernels: The device's kernels.

    Returns:
        Indices of the kept entries, those with the highest pooled saliency first.
    """
    keep, run_length = selection.keep, selection.run_length
    n = saliency.shape[0]
    # A wider window covers no more entries, but costs more.
    kernel_size = min(selection.kernel_size, 2 * n - 1)
    pooled = kernels.pool(saliency, kernel_size, run_length).unsqueeze(0)
    chosen = torch.topk(pooled, -(-keep // run_length)).indices[0]
    if run_length == 1:
        return chosen
    offsets = torch.arange(run_length, device=saliency.device)
    entries = (chosen.unsqueeze(1) * run_length + offsets).flatten()
    return entries[entries < n] if n % run_length else entries
