# SPDX-License-Identifier: Apache-2.0
"""The sparse block manager: pages for a request's cache, through vLLM's KV-cache registry.

vLLM's `KVCacheManager`, block pool, memory profiling and usage statistics work on top of this
unchanged. One page table serves all layers: in each, the fresh keys of the queries take the first
slots and the kept entries those after them. Layers keep different positions, and under some
settings different numbers of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_sparse_dllm.cache.policies import slots_of_context
from vllm_sparse_dllm.settings import DecodingSettings


@dataclass(frozen=True, kw_only=True)
class SparseCacheSpec(AttentionSpec):
    """Pages of a layer of a diffusion model.

    Attributes:
        settings: The engine's. vLLM checks at start that the pool has room for a request that
            fills the whole context under them.
        non_causal: Makes vLLM disable chunked prefill and prefix caching.
    """

    settings: DecodingSettings
    non_causal: bool = True

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        # vLLM also tries other lengths, to find the longest that fits.
        context = vllm_config.model_config.max_model_len
        slots = slots_of_context(context, self.settings, self.block_size)
        # At least one page, even if nothing is kept: vLLM does not accept an empty pool.
        return max(1, cdiv(slots, self.block_size)) * self.page_size_bytes


class SparseBlockManager(SingleTypeKVCacheManager):
    """Allocates the pages of requests.

    A request holds its pages for as long as it runs; one that evicts late holds more of them from
    a refresh until the eviction. There is no prefix to share: in a bidirectional model a key
    depends on the whole request.
    """

    def grow(self, request_id: str, num_pages: int) -> list[int] | None:
        """Allocate further pages to a request.

        Returns:
            Ids of the new pages, or None if the pool has too few free pages now.
        """
        if num_pages > self.num_free_pages:
            return None
        pages = self.block_pool.get_new_blocks(num_pages)
        if pages:
            self.req_to_blocks[request_id].extend(pages)
        return [page.block_id for page in pages]

    def shrink(self, request_id: str, num_pages: int) -> None:
        """Free all pages of a request except its first ``num_pages``."""
        if self.held_pages(request_id) <= num_pages:
            return
        pages = self.req_to_blocks[request_id]
        self.block_pool.free_blocks(reversed(pages[num_pages:]))
        del pages[num_pages:]
        if not pages:
            del self.req_to_blocks[request_id]

    @property
    def num_free_pages(self) -> int:
        """Pages that no request holds."""
        return self.block_pool.get_num_free_blocks()

    @property
    def num_pages(self) -> int:
        """Pages of the pool, without the one block that vLLM reserves for itself."""
        return self.block_pool.num_gpu_blocks - 1

    def held_pages(self, request_id: str) -> int:
        """Return how many pages a request holds."""
        return len(self.req_to_blocks.get(request_id, ()))

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Do nothing: nothing is shared between requests."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return 0


def register_block_manager() -> None:
    """Register the spec and its manager with vLLM; repeated calls are harmless."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SparseCacheSpec, manager_class=SparseBlockManager)
