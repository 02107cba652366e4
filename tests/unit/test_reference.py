"""The slow reference against hand-worked examples and the invariants of algorithms.md.

Numbers such as A9 or B6 are sections of algorithms.md.
"""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import Model, Stats, generate, generate_with_stats, load, write_checkpoint
from tests.reference.decode import (
    Options,
    at_factor,
    at_threshold,
    blocks,
    choose,
    draw,
    dream_count,
    importance,
    llada_quota,
    select,
    top_p_top_k,
)
from vllm_sparse_dllm.assets import embedded_model

TINY_LLADA = Path(embedded_model())
BOTH = pytest.mark.parametrize("kind", ["llada", "dream"])
CACHED = pytest.mark.parametrize("policy", ["prefix", "dual", "sparse"])
ALL = pytest.mark.parametrize("policy", ["none", "prefix", "dual", "sparse"])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("reference")
    small: dict[str, Any] = {"d_model": 64, "layers": 3, "heads": 4, "kv_heads": 2, "mlp": 128}
    return {
        kind: load(write_checkpoint(root / kind, kind, vocab=256, **small))
        for kind in ("llada", "dream")
    }


@cache
def prompt(length: int = 24, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(250) for _ in range(length))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def work(stats: Stats) -> tuple[int, int, int]:
    return stats.full_forwards, stats.block_forwards, stats.query_tokens


# ---------------------------------------------------------------------------------- A1, A2, B2, B6


def test_blocks_share_steps_in_proportion() -> None:
    assert list(blocks(64, 32, 64)) == [(32, 32), (32, 32)]
    assert list(blocks(64, 32, 16)) == [(32, 8), (32, 8)]
    assert list(blocks(70, 32, 35)) == [(32, 16), (32, 16), (6, 3)]
    assert list(blocks(10, 4, 7)) == [(4, 3), (4, 3), (2, 1)]  # shares 2, 2, 1; two left
    assert list(blocks(8, 2, 2)) == [(2, 1)] * 4  # never less than one step
    assert list(blocks(5, 32, 5)) == [(5, 5)]


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 400))
def test_blocks_cover_the_response(total: int, length: int, steps: int) -> None:
    shared = list(blocks(total, length, steps))
    assert sum(size for size, _ in shared) == total
    assert all(share >= 1 for _, share in shared)
    assert sum(share for _, share in shared) >= steps
    if all(steps * size >= total for size, _ in shared):
        assert sum(share for _, share in shared) == steps


def test_llada_quota() -> None:
    assert [llada_quota(i, 5, 32) for i in range(6)] == [7, 7, 6, 6, 6, 1]
    assert [llada_quota(i, 40, 32) for i in range(40)] == [1] * 32 + [0] * 8


@settings(deadline=None)
@given(st.integers(1, 128), st.integers(1, 200))
def test_counts_empty_the_block_by_the_last_step(masks: int, steps: int) -> None:
    assert sum(llada_quota(i, steps, masks) for i in range(steps)) == masks
    left = masks
    for i in range(steps):
        left -= dream_count(i, steps, left)
    assert left == 0


# By steps of a block of 32: the commits of each. The first step writes only x[s] (B6); if that is
# the only one, A2 adds further steps.
DREAM_TABLE = {
    32: [1, 0] + [1] * 29 + [2],
    16: [1] + [2] * 14 + [3],
    8: [1, 4, 4, 4, 4, 4, 5, 6],
    4: [1, 10, 10, 11],
    2: [1, 31],
    1: [1] * 32,
}


@pytest.mark.parametrize("steps", DREAM_TABLE)
def test_dream_reveals_per_step(models: dict[str, Model], steps: int) -> None:
    for policy in ("prefix", "dual", "sparse"):
        _, stats = generate_with_stats(
            models["dream"], prompt(8), 64, steps=2 * steps, cache_policy=policy
        )
        assert stats.reveals == [DREAM_TABLE[steps]] * 2
        assert all(block[0] == [8 + 32 * b] for b, block in enumerate(stats.commits))


def test_dream_reveals_in_a_block_of_16(models: dict[str, Model]) -> None:
    _, stats = generate_with_stats(models["dream"], prompt(8), 16, block_length=16)
    assert stats.reveals == [[1, 0] + [1] * 13 + [2]]


def test_vanilla_dream_reveals_per_step(models: dict[str, Model]) -> None:
    _, stats = generate_with_stats(
        models["dream"], prompt(8), 64, block_length=64, cache_policy="none"
    )
    assert stats.reveals == [[0] + [1] * 62 + [2]]
    assert work(stats) == (64, 0, 64 * 72)


@ALL
def test_llada_reveals_per_step(models: dict[str, Model], policy: str) -> None:
    def reveals(**options: Any) -> list[list[int]]:
        run = generate_with_stats(models["llada"], prompt(8), cache_policy=policy, **options)
        return run[1].reveals

    assert reveals(max_tokens=40, block_length=16, steps=10) == [[4] * 4, [4] * 4, [4] * 2]
    assert reveals(max_tokens=12, block_length=8, steps=8) == [[2, 2, 1, 1, 1, 1], [2, 2]]
    assert reveals(max_tokens=8, block_length=8, steps=20) == [[1] * 8]  # A2: S > B costs nothing


# ------------------------------------------------------------------------------------------ B4, A6


def test_threshold_by_hand() -> None:
    assert at_threshold(torch.tensor([0.9, 0.8, 0.8, 0.1]), 0.8) == 3  # >=, in float32
    assert at_threshold(torch.tensor([0.5, 0.4]), 0.9) == 1
    assert at_threshold(torch.tensor([0.95, 0.9]), 0.9) == 2


def test_factor_by_hand() -> None:
    # factor 1: h = -1, 0.667, 0.75, 0.8
    assert at_factor(torch.tensor([0.9, 0.5, 0.4, 0.3]), 1.0) == 1
    assert at_factor(torch.tensor([0.9, 0.8, 0.7, 0.6]), 1.0) == 2
    assert (
        at_factor(torch.tensor([0.9, 0.8, 0.76, 0.6]), 1.0) == 4
    )  # the quirk: only the last fails
    assert at_factor(torch.tensor([0.9, 0.9, 0.9, 0.9]), 1.0) == 4
    assert at_factor(torch.tensor([0.1, 0.0]), 1.0) == 2
    assert at_factor(torch.tensor([0.1]), 1.0) == 1


@BOTH
@ALL
def test_threshold_and_factor_extremes(models: dict[str, Model], kind: str, policy: str) -> None:
    def reveals(**options: Any) -> list[int]:
        run = generate_with_stats(
            models[kind], prompt(), 16, block_length=16, cache_policy=policy, **options
        )
        return run[1].reveals[0]

    first = [1] if kind == "dream" and policy != "none" else []
    assert reveals(threshold=1e-9) == first + [16 - len(first)]
    assert reveals(factor=1e9) == first + [16 - len(first)]  # all thresholds negative
    assert reveals(threshold=1.0) == [1] * 16
    assert reveals(factor=1e-6) == [1] * 14 + [2]  # two left: both go
    assert reveals(threshold=1.0, steps=3) == [1] * 16  # steps do not bound a threshold


@BOTH
def test_threshold_ignores_the_rule(models: dict[str, Model], kind: str) -> None:
    rules = ("low_confidence", "random", "topk_margin", "entropy", "origin")
    outputs = {
        tuple(generate(models[kind], prompt(), 32, threshold=0.3, remasking=rule)) for rule in rules
    }
    assert len(outputs) == 1


def test_options_are_checked(models: dict[str, Model]) -> None:
    for wrong in (
        {"kernel_size": 2},
        {"factor": 1.0, "threshold": 0.5},
        {"cache_policy": "x"},
        {"remasking": "x"},
        {"granularity": "x"},
        {"saliency": "x"},
    ):
        with pytest.raises(ValueError):
            Options(**wrong)
    with pytest.raises(ValueError):
        generate(models["dream"], prompt(), 4, cfg_scale=1.0)


# ------------------------------------------------------------------------------------------ B5, A9


def test_importance_by_hand() -> None:
    """Two query heads on one kv head: mean query (1, 0) and (0, 2); mean score (k0 + 2 k1) / 2."""
    q = torch.tensor([[[2.0, 1.0], [0.0, -1.0]], [[0.0, 4.0], [0.0, 0.0]]])
    k = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]]])
    assert importance(q, k).tolist() == [0.5, 1.0, 4.0]


def test_selection_by_hand() -> None:
    scores = torch.tensor([1.0, 9.0, 2.0, 3.0, 8.0, 0.0, 4.0, 5.0])

    def kept(n: int = 8, **options: Any) -> list[int]:
        return select(scores[:n], Options(**options)).tolist()

    assert kept(keep_ratio=0.5, kernel_size=1) == [1, 4, 7, 6]  # descending importance
    assert sorted(kept(keep_ratio=0.75)) == [0, 1, 2, 3, 4, 5]  # pooled 9 9 9 8 8 8 5 5
    assert sorted(kept(keep_ratio=0.375)) == [0, 1, 2]
    assert kept(keep_ratio=0.1) == []
    page: dict[str, Any] = {"granularity": "page", "page": 2, "kernel_size": 1}
    assert kept(keep_ratio=0.5, **page) == [0, 1, 4, 5]  # run maxima 9 3 8 5
    assert kept(keep_ratio=0.4, **page) == [0, 1, 4, 5]  # keep 3: two runs
    assert kept(keep_ratio=0.25, **page) == [0, 1]
    assert kept(keep_ratio=0.1, **page) == []
    assert kept(7, keep_ratio=1.0, **page) == [0, 1, 4, 5, 6, 2, 3]  # the last run is short
    assert len(select(torch.rand(100), Options(keep_ratio=0.29))) == 28  # 28.999..., truncated
    assert select(torch.rand(0), Options()).tolist() == []


@given(st.integers(1, 200), st.floats(0.01, 1.0), st.sampled_from([1, 3, 5]), st.integers(0, 9))
@settings(deadline=None)
def test_pages_of_one_are_tokens(n: int, ratio: float, kernel: int, seed: int) -> None:
    scores = torch.rand(n, generator=rng(seed))
    token = Options(keep_ratio=ratio, kernel_size=kernel)
    page = replace(token, granularity="page", page=1)
    assert select(scores, token).tolist() == select(scores, page).tolist()


def test_what_is_kept(models: dict[str, Model]) -> None:
    """One selection a block, per layer; the block itself is never in it; n = L - block size."""
    _, stats = generate_with_stats(models["llada"], prompt(20), 40, block_length=16)
    assert len(stats.kept) == 3
    for (s, e), layers in zip([(20, 36), (36, 52), (52, 60)], stats.kept, strict=True):
        assert len(layers) == 3
        for positions in layers:
            assert len(positions) == int((60 - (e - s)) * 0.5) == len(set(positions.tolist()))
            assert not any(s <= p < e for p in positions.tolist())


@pytest.mark.parametrize("policy", ["prefix", "dual"])
def test_what_is_frozen(models: dict[str, Model], policy: str) -> None:
    _, stats = generate_with_stats(
        models["llada"], prompt(20), 40, block_length=16, cache_policy=policy
    )
    assert len(stats.kept) == 3
    for (s, e), layers in zip([(20, 36), (36, 52), (52, 60)], stats.kept, strict=True):
        after = [] if policy == "prefix" else list(range(e, 60))
        assert [positions.tolist() for positions in layers] == [[*range(s), *after]] * 3


def test_late_eviction_keeps_a_part_of_what_was_kept(models: dict[str, Model]) -> None:
    """First everything but the block; then, d block steps later, int(n * ratio) of it."""
    _, stats = generate_with_stats(
        models["llada"], prompt(20), 40, block_length=16, delay_steps=0, eviction_delay=3
    )
    assert (stats.full_forwards, len(stats.kept)) == (3, 6)
    for (s, e), first, then in zip(
        [(20, 36), (36, 52), (52, 60)], stats.kept[::2], stats.kept[1::2], strict=True
    ):
        everything = [*range(s), *range(e, 60)]
        for before, after in zip(first, then, strict=True):
            assert before.tolist() == everything
            assert len(set(after.tolist())) == len(after) == len(everything) // 2
            assert set(after.tolist()) <= set(everything)


@BOTH
def test_late_eviction_at_its_limits(models: dict[str, Model], kind: str) -> None:
    """If it comes too late for every block, or evicts nothing, the tokens are those of `dual`."""
    dual = generate(models[kind], prompt(20), 40, block_length=16, cache_policy="dual")
    for own in ({"eviction_delay": 99}, {"eviction_delay": 2, "keep_ratio": 1.0}):
        late = generate(models[kind], prompt(20), 40, block_length=16, delay_steps=0, **own)
        assert late == dual


@pytest.mark.parametrize("policy", ["prefix", "dual", "sparse"])
def test_forwards_between_refreshes(models: dict[str, Model], policy: str) -> None:
    """For k = 3, blocks 1, 2 and 4 run no full forward; their first steps add the block before."""
    options = {"block_length": 8, "cache_policy": policy, "delay_steps": 0}
    run = {
        k: generate_with_stats(models["llada"], prompt(20), 40, refresh_interval=k, **options)[1]
        for k in (1, 3, 99)
    }
    assert [run[k].full_forwards for k in run] == [5, 2, 1]
    assert [run[k].block_forwards for k in run] == [35, 38, 39]
    ends = {"prefix": [60] * 5}.get(policy, [28, 36, 44, 52, 60])
    steps = [ends[b] - (20 + 8 * b) for b in range(5)]
    appends = sum(8 + steps[b] for b in (1, 2, 4))
    assert run[3].query_tokens == 2 * 60 + appends + 7 * sum(steps)
    assert run[3].changes.count("refresh") == 2


@BOTH
@pytest.mark.parametrize("policy", ["none", "prefix", "dual", "sparse"])
def test_windows(models: dict[str, Model], kind: str, policy: str) -> None:
    """A wide window changes nothing; with a window of 0, a block does not see those after it."""
    options = {"block_length": 16, "cache_policy": policy}
    whole = generate(models[kind], prompt(20), 48, **options)
    assert generate(models[kind], prompt(20), 48, suffix_window=48, **options) == whole
    alone = generate(models[kind], prompt(20), 32, suffix_window=0, **options)
    assert generate(models[kind], prompt(20), 48, suffix_window=0, **options)[:32] == alone
    # With a window of one block, the first block is as if the response ended after the second.
    near = generate(models[kind], prompt(20), 48, suffix_window=16, **options)
    assert near[:16] == generate(models[kind], prompt(20), 32, **options)[:16]


# ----------------------------------------------------------------------------------------- B1, A10


@BOTH
def test_network_equals_transformers(
    models: dict[str, Model], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """If every query can see every key, LLaDA equals Llama, and Dream equals Qwen2."""
    transformers = pytest.importorskip("transformers")
    model = models[kind]
    common = {
        "hidden_size": model.embedding.shape[1],
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.layers[0].up.shape[0],
        "vocab_size": model.vocab,
        "rms_norm_eps": model.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.theta},
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if kind == "llada":
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    else:
        other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    state = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head,
    }
    for i, w in enumerate(model.layers):
        b = f"model.layers.{i}."
        state[b + "input_layernorm.weight"] = w.attn_norm
        state[b + "post_attention_layernorm.weight"] = w.mlp_norm
        for name, weight in (("q", w.q), ("k", w.k), ("v", w.v), ("o", w.o)):
            state[f"{b}self_attn.{name}_proj.weight"] = weight
        for name, bias in (("q", w.q_bias), ("k", w.k_bias), ("v", w.v_bias)):
            if bias is not None:
                state[f"{b}self_attn.{name}_proj.bias"] = bias
        for name, weight in (("gate", w.gate), ("up", w.up), ("down", w.down)):
            state[f"{b}mlp.{name}_proj.weight"] = weight
    other.load_state_dict(state, strict=True)
    ids = torch.tensor(prompt(40))
    with torch.inference_mode():
        see_all = torch.zeros(1, 1, 40, 40)
        want = other(input_ids=ids[None], attention_mask=see_all, use_cache=False).logits[0]
    torch.testing.assert_close(model(ids, range(40)).logits, want, atol=2e-4, rtol=1e-4)


@BOTH
def test_extra_keys_stand_for_their_rows(models: dict[str, Model], kind: str) -> None:
    """A block forward with all other keys of a full forward gives the full forward's rows."""
    model, ids = models[kind], torch.tensor(prompt(40))
    full = model(ids, range(40))
    others = torch.tensor([*range(25, 40), *range(10)])  # any order
    extra = [(k[:, others], v[:, others]) for k, v in zip(full.k, full.v, strict=True)]
    block = model(ids[10:25], range(10, 25), extra)
    torch.testing.assert_close(block.logits, full.logits[10:25], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(block.k[-1], full.k[-1][:, 10:25], atol=1e-4, rtol=1e-4)


def test_checkpoint_layouts(tmp_path: Path) -> None:
    small: dict[str, Any] = {"d_model": 64, "layers": 2, "heads": 2, "mlp": 64, "vocab": 128}
    one = write_checkpoint(tmp_path / "one", **small)
    many = write_checkpoint(tmp_path / "many", **small, shards=3, dtype=torch.bfloat16)
    assert len(list(many.glob("*.safetensors"))) == 3
    ids = range(16)
    assert load(one)(ids, ids).logits.equal(load(many)(ids, ids).logits)  # the bfloat16 grid
    assert load(one).kv_heads == 2
    narrow = load(many, torch.bfloat16)
    assert narrow(ids, ids).logits.dtype == torch.bfloat16
    assert len(generate(narrow, ids, 40)) == 40


def test_checkpoint_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = write_checkpoint(
        tmp_path, "dream", d_model=64, layers=1, heads=2, vocab=128, tokenizer=True
    )
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 128
    text = "Hello, [world]\n 42"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.decode(list(range(40, 42)) + [100]) == "HI w100"
    assert tokenizer.token_to_id("<|mask|>") == load(path).mask_id == 126
    assert tokenizer.token_to_id("<|eos|>") == load(path).eos_id == 125


@BOTH
@ALL
def test_greedy_decoding_is_not_degenerate(
    models: dict[str, Model], kind: str, policy: str
) -> None:
    out = generate(models[kind], prompt(), 64, cache_policy=policy)
    assert len(out) == 64 and len(set(out)) > 10
    assert out != generate(models[kind], prompt(seed=1), 64, cache_policy=policy)


# ------------------------------------------------------------------------- B3 to B8, B10: policies


def test_none_is_vanilla_llada(models: dict[str, Model]) -> None:
    """B3 written out again, with 4 steps per block of 16."""
    model = models["llada"]
    x = torch.tensor([*prompt()] + [model.mask_id] * 32)
    for s in (24, 40):
        for _ in range(4):
            probs = model(x, range(56)).logits.softmax(-1)
            best, tokens = probs.max(-1)
            best[x != model.mask_id] = -torch.inf
            best[s + 16 :] = -torch.inf
            chosen = torch.topk(best, 4).indices
            x[chosen] = tokens[chosen]
    out, stats = generate_with_stats(
        model, prompt(), 32, steps=8, block_length=16, cache_policy="none"
    )
    assert out == x[24:].tolist()
    assert work(stats) == (8, 0, 8 * 56)


@CACHED
def test_dream_first_step_writes_the_shifted_argmax(models: dict[str, Model], policy: str) -> None:
    model = models["dream"]
    x = torch.tensor([*prompt()] + [model.mask_id] * 8)
    want = model(x, range(32)).logits[23].argmax()
    assert generate(model, prompt(), 8, cache_policy=policy)[0] == want


def test_one_token_of_dream_comes_from_the_row_before(models: dict[str, Model]) -> None:
    model = models["dream"]
    logits = model([*prompt(), model.mask_id], range(25)).logits
    assert generate(model, prompt(), 1, cache_policy="none") == [int(logits[23].argmax())]


def test_query_tokens_of_llada(models: dict[str, Model]) -> None:
    prompt_length, total, size, steps = 24, 64, 16, 8
    length, count = prompt_length + total, total // size

    def cost(policy: str, **options: Any) -> tuple[int, int, int]:
        run = generate_with_stats(
            models["llada"],
            prompt(prompt_length),
            total,
            block_length=size,
            steps=steps * count,
            cache_policy=policy,
            **options,
        )
        return work(run[1])

    block_steps = (steps - 1) * count
    suffix = sum(length + (steps - 1) * (total - b * size) for b in range(count))
    assert cost("none") == (count * steps, 0, count * steps * length)
    assert cost("prefix") == (count, block_steps, suffix)
    assert cost("dual") == (count, block_steps, count * (length + (steps - 1) * size))
    for d in (0, 1, 3):
        full, block = d + 1, steps - d - 1
        tokens = count * (full * length + block * size)
        assert cost("sparse", delay_steps=d) == (count * full, count * block, tokens)
    doubled = tuple(2 * n for n in cost("sparse"))
    assert cost("sparse", cfg_scale=0.5) == doubled


def test_sparse_of_two_steps_is_vanilla(models: dict[str, Model]) -> None:
    for steps in (2, 4):
        sparse = generate(models["llada"], prompt(), 32, steps=steps, block_length=16)
        assert sparse == generate(
            models["llada"], prompt(), 32, steps=steps, block_length=16, cache_policy="none"
        )


@BOTH
def test_kernel_1_is_no_pooling(models: dict[str, Model], kind: str) -> None:
    outputs = [generate(models[kind], prompt(), 64, kernel_size=k) for k in (None, 1)]
    assert outputs[0] == outputs[1]


@BOTH
def test_keep_all_is_the_same_for_every_kernel_and_page(
    models: dict[str, Model], kind: str
) -> None:
    outputs = {
        tuple(generate(models[kind], prompt(), 64, keep_ratio=1.0, kernel_size=kernel, **pages))
        for kernel in (1, 3, 5)
        for pages in ({}, {"granularity": "page", "page": 8})
    }
    assert len(outputs) == 1


@BOTH
def test_keep_all_without_delay_is_dual(models: dict[str, Model], kind: str) -> None:
    """Only the first step of a block refreshes; with a delay of 1 sparse is not dual (B10)."""
    dual, stats = generate_with_stats(models[kind], prompt(), 64, cache_policy="dual")
    now, same = generate_with_stats(models[kind], prompt(), 64, keep_ratio=1.0, delay_steps=0)
    assert now == dual and work(stats) == work(same)
    assert generate(models[kind], prompt(), 64, keep_ratio=1.0) != dual


@BOTH
def test_prefix_is_dual_on_the_last_block(models: dict[str, Model], kind: str) -> None:
    outputs = [generate(models[kind], prompt(), 32, cache_policy=p) for p in ("prefix", "dual")]
    assert outputs[0] == outputs[1]


def test_a_delay_past_the_last_step_is_vanilla(models: dict[str, Model]) -> None:
    late, stats = generate_with_stats(models["llada"], prompt(), 32, delay_steps=99)
    assert late == generate(models["llada"], prompt(), 32, cache_policy="none")
    assert stats.kept == []


@BOTH
def test_keep_ratio_and_granularity_matter(models: dict[str, Model], kind: str) -> None:
    outputs = {
        tuple(generate(models[kind], prompt(64), 64, keep_ratio=ratio, granularity=granularity))
        for ratio, granularity in ((1.0, "token"), (0.5, "token"), (0.5, "page"), (0.1, "token"))
    }
    assert len(outputs) == 4


@BOTH
def test_same_forwards_whatever_the_granularity(models: dict[str, Model], kind: str) -> None:
    token, page = (
        generate_with_stats(models[kind], prompt(40), 40, granularity=g)[1]
        for g in ("token", "page")
    )
    assert work(token) == work(page)
    for s, e, layers in zip((40, 72), (72, 80), page.kept, strict=True):
        others = [p for p in range(80) if not s <= p < e]
        for positions in layers:  # whole runs of 32 of the others
            runs = {others.index(p) // 32 for p in positions.tolist()}
            assert len(runs) == -(-(len(others) // 2) // 32)
            assert len(positions) == sum(len(others[32 * r : 32 * r + 32]) for r in runs)


# ---------------------------------------------------------------------------- A3, A7, A10, A11


@BOTH
@ALL
def test_the_mask_id_is_never_committed(models: dict[str, Model], kind: str, policy: str) -> None:
    """Even if a head often prefers the mask id, whose logit is twice that of another token."""
    model = models[kind]
    head = model.head.clone()
    head[model.mask_id] = 2 * head[7]
    model = replace(model, head=head)
    for options in ({}, {"temperature": 1.0, "top_k": 1}, {"threshold": 0.5}):
        out = generate(model, prompt(), 16, cache_policy=policy, generator=rng(0), **options)
        assert len(out) == 16 and model.mask_id not in out


@BOTH
def test_a_filter_that_leaves_only_the_mask_id(models: dict[str, Model], kind: str) -> None:
    """The best other token is then taken, as at temperature 0."""
    model = models[kind]
    logits = torch.zeros(1, model.vocab)
    logits[0, model.mask_id], logits[0, 9] = 20.0, 10.0
    cuts: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.5}]
    for cut in cuts:
        tokens, _ = draw(logits, model, Options(temperature=1.0, generator=rng(0), **cut))
        assert tokens.tolist() == [9]


def test_confidence_counts_the_mask_id(models: dict[str, Model]) -> None:
    """A3: the softmax runs over all tokens. Row 0 loses to row 1 because of its mask logit."""
    model = models["llada"]
    logits = torch.zeros(2, model.vocab)
    logits[0, 3], logits[0, model.mask_id] = 6.0, 9.0
    logits[1, 4] = 5.0
    tokens, chosen = choose(logits, model, Options(), 0, 2, 2)
    assert tokens.tolist() == [3, 4] and chosen.tolist() == [1]


def test_rules_rank_by_their_own_confidence(models: dict[str, Model]) -> None:
    model = models["dream"]
    probs = torch.full((3, model.vocab), 1e-12)
    probs[0, :2] = torch.tensor([0.50, 0.50])  # entropy 0.69, margin 0, top .5
    probs[1, :2] = torch.tensor([0.60, 0.40])  # entropy 0.67, margin .2, top .6
    probs[2, :7] = torch.tensor([0.55] + [0.075] * 6)  # entropy 1.5, margin .475, top .55
    logits = probs.log()

    def order(rule: str) -> list[int]:
        return choose(logits, model, Options(remasking=rule), 0, 1, 3)[1].tolist()

    assert order("maskgit_plus") == order("low_confidence") == [1, 2, 0]
    assert order("topk_margin") == [2, 1, 0]
    assert order("entropy") == [1, 0, 2]


def test_top_p_then_top_k() -> None:
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3]])

    def kept(top_p: float, top_k: int) -> list[int]:
        return top_p_top_k(probs.log(), top_p, top_k)[0].isfinite().nonzero()[:, 0].tolist()

    assert kept(1.0, 0) == [0, 1, 2, 3]
    assert kept(0.7, 0) == [1, 3]
    assert kept(0.9, 0) == [0, 1, 3]
    assert kept(0.1, 0) == [1]
    assert kept(0.9, 1) == [1]
    assert kept(0.1, 3) == [1]
    assert kept(1.0, 99) == [0, 1, 2, 3]


@BOTH
def test_draws_follow_the_distribution(models: dict[str, Model], kind: str) -> None:
    """Draws for 20,000 equal rows, by LLaDA's Gumbel noise and by Dream's race, agree with it."""
    model = replace(models[kind], head=torch.zeros(5, 64), mask_id=4)
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 3.0]).repeat(20000, 1)
    tokens, probs = draw(logits, model, Options(temperature=0.7, generator=rng(0)))
    want = (logits[0, :4] / 0.7).softmax(-1)
    got = tokens.bincount(minlength=5) / len(tokens)
    assert got[4] == 0
    torch.testing.assert_close(got[:4], want, atol=0.015, rtol=0.0)
    scale = 1.0 if kind == "llada" else 0.7  # A7: where the confidence comes from
    torch.testing.assert_close(probs[0], (logits[0] / scale).softmax(-1))


def test_a_vanishing_temperature_is_greedy(models: dict[str, Model]) -> None:
    cold = generate(models["llada"], prompt(), 32, temperature=1e-9, generator=rng(0))
    assert cold == generate(models["llada"], prompt(), 32)


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.0, "threshold": 0.2},
        {"remasking": "random"},
        {"remasking": "random", "temperature": 0.5},
        {"remasking": "origin"},
        {"remasking": "origin", "steps": 1},
        {"alg_temp": 0.5},
        {"alg_temp": 0.5, "temperature": 0.5, "steps": 8},
    ],
    ids=str,
)
def test_seeds_reproduce(models: dict[str, Model], kind: str, options: dict[str, Any]) -> None:
    def run(seed: int) -> list[int]:
        return generate(models[kind], prompt(), 32, generator=rng(seed), **options)

    first = run(1)
    assert first == run(1) and len(first) == 32 and models[kind].mask_id not in first
    if options.get("steps") != 1:  # one step leaves the rule no choice
        assert first != run(2)


def test_origin_steps_end_with_the_block(models: dict[str, Model]) -> None:
    for kind in ("llada", "dream"):
        _, stats = generate_with_stats(
            models[kind], prompt(), 32, steps=8, remasking="origin", generator=rng(0)
        )
        assert sum(stats.reveals[0]) == 32 and len(stats.reveals[0]) <= 8
    _, stats = generate_with_stats(
        models["dream"], prompt(), 32, steps=1, remasking="origin", generator=rng(0)
    )
    assert stats.reveals == [[1, 31]]


def test_a_step_that_commits_nothing_draws_nothing(models: dict[str, Model]) -> None:
    generator = rng(0)
    before = generator.get_state()
    o = Options(temperature=1.0, alg_temp=1.0, generator=generator)
    logits = torch.rand(31, models["dream"].vocab)
    assert dream_count(1, 32, 31) == 0
    assert choose(logits, models["dream"], o, 1, 32, 32)[1].tolist() == []
    assert generator.get_state().equal(before)


def test_cfg_formula(models: dict[str, Model]) -> None:
    model = models["llada"]
    cond = model([*prompt(), model.mask_id], range(25)).logits[24]
    un = model([model.mask_id] * 25, range(25)).logits[24]
    for w in (0.5, 1.0, 3.0):
        want = int((un + (w + 1) * (cond - un)).argmax())
        assert generate(model, prompt(), 1, cfg_scale=w) == [want]
    assert want != cond.argmax()


@ALL
def test_cfg(models: dict[str, Model], policy: str) -> None:
    model = models["llada"]
    masks = [model.mask_id] * 24  # so both sequences are the same
    plain = generate(model, masks, 32, cache_policy=policy)
    assert plain == generate(model, masks, 32, cache_policy=policy, cfg_scale=2.0)
    guided = generate(model, prompt(), 32, cache_policy=policy, cfg_scale=2.0)
    assert guided != generate(model, prompt(), 32, cache_policy=policy)


def test_eos_cuts_the_response(models: dict[str, Model]) -> None:
    out = generate(models["llada"], prompt(), 32)
    eos = out[20]
    cut = generate(models["llada"], prompt(), 32, ignore_eos=False, eos_id=eos)
    assert cut == out[: out.index(eos) + 1]
    assert generate(models["llada"], prompt(), 32, ignore_eos=False) == out


# --------------------------------------------------------------------------------- a trained model


@pytest.mark.skipif(not TINY_LLADA.exists(), reason="the trained checkpoint is not here")
def test_trained_llada_answers() -> None:
    """It answers at least 3 of 4 prompts, which ask for the values of two keys."""
    from tokenizers import Tokenizer

    model = load(TINY_LLADA)
    tokenizer = Tokenizer.from_file(str(TINY_LLADA / "tokenizer.json"))
    words = (
        "file name object string value line number list module data type path method set".split()
    )
    right = 0
    for seed in range(4):
        rand = random.Random(seed)
        pairs = [(key, f"{rand.randrange(100):02d}") for key in rand.sample(words, len(words))]
        asked = rand.sample(pairs, 2)
        text = "".join(f" {key}{value}" for key, value in pairs)
        text += " get" + "".join(f" {key}" for key, _ in asked)
        ids = tokenizer.encode(f"<|startoftext|><|user|>{text}<|eot_id|><|assistant|>").ids
        out = generate(model, ids, 32, cache_policy="none")
        answer = "".join(f" {key}{value}" for key, value in asked) + "<|eot_id|>"
        right += tokenizer.decode(out, skip_special_tokens=False).startswith(answer)
    assert right >= 3
