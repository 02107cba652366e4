# SPDX-License-Identifier: Apache-2.0
"""The sparse block manager on a real block pool of vLLM, under any sequence of calls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_sparse_dllm.cache.block_manager import (
    SparseBlockManager,
    SparseCacheSpec,
    register_block_manager,
)
from vllm_sparse_dllm.settings import DecodingSettings


def make_spec(**decoding: Any) -> SparseCacheSpec:
    return SparseCacheSpec(
        block_size=32,
        num_kv_heads=2,
        head_size=64,
        dtype=torch.float32,
        dcp_sharded=False,
        settings=DecodingSettings(**decoding),
    )


def make_manager(num_blocks: int) -> SparseBlockManager:
    pool = BlockPool(num_blocks, enable_caching=False, hash_block_size=32)
    return SparseBlockManager(
        make_spec(), pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=32
    )


class Pages(RuleBasedStateMachine):
    """Requests arrive, hold pages, and leave; compared with a dictionary of lists."""

    holders = Bundle("holders")

    @initialize(num_blocks=st.integers(1, 40))
    def start(self, num_blocks: int) -> None:
        self.manager = make_manager(num_blocks)
        self.total = num_blocks - 1  # one is vLLM's null block
        self.held: dict[str, list[int]] = {}
        self.next_id = 0

    @property
    def free_pages(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    @rule(target=holders)
    def arrive(self) -> str:
        request_id = f"r{self.next_id}"
        self.next_id += 1
        self.held[request_id] = []
        return request_id

    @rule(request_id=holders, num_pages=st.integers(0, 45))
    def grow(self, request_id: str, num_pages: int) -> None:
        """All requested pages are appended to those held, or none."""
        before = self.free_pages
        pages = self.manager.grow(request_id, num_pages)
        if num_pages > before:
            assert pages is None
        else:
            assert pages is not None and len(pages) == num_pages
            self.held[request_id] += pages
        assert self.free_pages == before - len(pages or [])

    @rule(request_id=holders, num_pages=st.integers(0, 45))
    def shrink(self, request_id: str, num_pages: int) -> None:
        """The first pages stay, in order; a request that holds fewer keeps them all."""
        before = self.free_pages
        self.manager.shrink(request_id, num_pages)
        given_back = self.held[request_id][num_pages:]
        del self.held[request_id][num_pages:]
        assert self.free_pages == before + len(given_back)

    @rule(request_id=consumes(holders))
    def free(self, request_id: str) -> None:
        self.manager.free(request_id)
        del self.held[request_id]

    @rule()
    def free_an_unknown_one(self) -> None:
        self.manager.free("nobody")

    @invariant()
    def no_page_has_two_owners(self) -> None:
        pages = [page for own in self.held.values() for page in own]
        assert len(pages) == len(set(pages))
        assert all(0 <= page <= self.total for page in pages)
        assert self.manager.block_pool.null_block.block_id not in pages

    @invariant()
    def every_page_is_held_or_free(self) -> None:
        assert self.manager.num_pages == self.total
        num_held = sum(map(len, self.held.values()))
        assert self.free_pages + num_held == self.total
        for request_id, pages in self.held.items():
            assert self.manager.held_pages(request_id) == len(pages)
            own = self.manager.req_to_blocks.get(request_id, [])
            assert [page.block_id for page in own] == pages
        usage = self.manager.block_pool.get_usage()
        assert usage == pytest.approx(num_held / self.total if self.total else 0)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for request_id in self.held:
            self.manager.free(request_id)
        assert self.free_pages == self.total
        assert not any(self.manager.req_to_blocks.values())
        assert all(block.ref_cnt == 0 for block in self.manager.block_pool.blocks[1:])
        # No page is lost: one request can have the whole pool.
        pages = self.manager.grow("all", self.total)
        assert sorted(pages or []) == [
            block.block_id for block in self.manager.block_pool.blocks if not block.is_null
        ]


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_request_without_pages_is_no_holder() -> None:
    """A request of policy ``none`` holds no pages, and can be admitted again once preempted."""
    manager = make_manager(4)
    assert manager.grow("a", 0) == []
    assert manager.held_pages("a") == 0
    manager.free("a")
    assert manager.grow("a", 3) is not None


def test_a_first_share_that_fails_leaves_nothing_behind() -> None:
    manager = make_manager(4)
    assert manager.grow("a", 4) is None
    assert manager.held_pages("a") == 0
    assert manager.grow("a", 3) is not None
    assert manager.grow("b", 1) is None


def test_a_failed_growth_changes_nothing() -> None:
    manager = make_manager(6)
    first = manager.grow("a", 2)
    assert manager.grow("a", 4) is None
    assert manager.held_pages("a") == 2
    more = manager.grow("a", 3)
    assert first is not None and more is not None
    assert len({*first, *more}) == 5
    manager.shrink("a", 7)
    assert manager.held_pages("a") == 5
    manager.shrink("a", 2)
    assert [page.block_id for page in manager.req_to_blocks["a"]] == first
    manager.shrink("a", 0)
    assert manager.grow("a", 5) is not None  # after holding none, it can grow again


def test_no_prefix_is_ever_shared() -> None:
    manager = make_manager(4)
    hits, length = SparseBlockManager.find_longest_cache_hit(
        [], 128, [0], manager.block_pool, manager.kv_cache_spec, False, 32
    )
    assert (hits, length) == (([],), 0)
    assert manager.get_num_common_prefix_blocks("a") == 0
    assert manager.get_num_skipped_tokens(100) == 0
    assert manager.grow("a", 1) is not None


@pytest.mark.parametrize(
    ("decoding", "context", "pages"),
    [
        ({"cache_policy": "none"}, 512, 1),
        ({"cache_policy": "dual"}, 1, 1),
        ({"cache_policy": "dual"}, 32, 1),
        ({"cache_policy": "dual"}, 33, 2),
        ({"cache_policy": "dual"}, 512, 16),
        ({"cache_policy": "sparse", "keep_ratio": 0.5}, 512, 9),  # 240 kept, 32 of the block
        ({"cache_policy": "sparse", "keep_ratio": 0.5, "eviction_delay": 2}, 512, 16),
    ],
)
def test_spec_asks_for_a_request_of_the_whole_context_and_at_least_one_page(
    decoding: dict[str, Any], context: int, pages: int
) -> None:
    spec = make_spec(**decoding)
    config: Any = SimpleNamespace(model_config=SimpleNamespace(max_model_len=context))
    assert spec.page_size_bytes == 2 * 32 * 2 * 64 * 4  # keys and values of 32 slots, float32
    assert spec.max_memory_usage_bytes(config) == pages * spec.page_size_bytes
    assert not spec.prefix_cacheable
    assert spec.non_causal


def test_registration_may_be_repeated() -> None:
    register_block_manager()
    register_block_manager()
    assert KVCacheSpecRegistry.get_manager_class(make_spec()) is SparseBlockManager
