# SPDX-License-Identifier: Apache-2.0
"""Choice of the attention backend for a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm.logger import init_logger

from vllm_sparse_dllm.attention.cpu_tiles import TileBackend
from vllm_sparse_dllm.attention.flash_attn import FlashAttentionBackend
from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.attention.portable import PortableBackend
from vllm_sparse_dllm.attention.triton import TritonBackend
from vllm_sparse_dllm.attention.xformers import XFormersBackend
from vllm_sparse_dllm.kernels import native

logger = init_logger("vllm." + __name__)

#: Backends that the settings can name; `auto`, not listed here, picks the best one for a device.
BACKENDS: dict[str, type[AttentionBackend]] = {
    "triton": TritonBackend,
    "flash_attn": FlashAttentionBackend,
    "xformers": XFormersBackend,
    "portable": PortableBackend,
}


def choose_backend(
    name: str, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
) -> type[AttentionBackend]:
    """Return the backend that a name stands for.

    `auto` is this package's own kernels or vLLM's on a CPU, Triton's on CUDA, and plain PyTorch
    where these cannot run or are slower.

    Raises:
        ValueError: If the named backend cannot run here.
    """
    if name != "auto":
        backend = BACKENDS[name]
        reason = backend.why_not(shape, page_size, dtype, device)
        if reason is not None:
            raise ValueError(f"attention_backend {name} cannot be used here: {reason}")
        return backend
    for backend in _preferred(dtype, device):
        reason = backend.why_not(shape, page_size, dtype, device)
        if reason is None:
            return backend
        logger.debug("Attention without %s: %s", backend.__name__, reason)
    return PortableBackend


def _preferred(dtype: torch.dtype, device: torch.device) -> Iterator[type[AttentionBackend]]:
    if device.type != "cpu":
        yield TritonBackend
        return
    yield TileBackend
    if native.lacks_avx512() and dtype != torch.float16:
        # On such processors vLLM's kernel takes twice as long as PyTorch's over whole sequences
        # and no less over a block's kept keys; only in float16 is PyTorch's slower.
        return
    # Imported only here because the module needs vLLM's CPU build.
    from vllm_sparse_dllm.attention.cpu import CPUBackend

    yield CPUBackend


def make_backend(
    shape: AttentionShape,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    name: str = "auto",
) -> AttentionBackend:
    """Create the backend for a device.

    Raises:
        ValueError: If the named backend cannot run here.
    """
    return choose_backend(name, shape, page_size, dtype, device)(shape, page_size, dtype, device)
