# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a mixed batch, against the reference run on each request alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.decode import Options, at_factor, at_threshold, choose
from tests.unit.helpers import reference_model, traits_of
from vllm_sparse_dllm.denoise import sampling
from vllm_sparse_dllm.denoise.plan import Candidates, plan_step
from vllm_sparse_dllm.denoise.rules import RULES, factor_counts, threshold_counts
from vllm_sparse_dllm.denoise.sampling import restrict
from vllm_sparse_dllm.denoise.step import Commits, LogitsOf, denoise
from vllm_sparse_dllm.denoise.timetable import commit_fractions
from vllm_sparse_dllm.transfer import HostArrays, read_back

VOCAB, MASK = 37, 3
KINDS = pytest.mark.parametrize("kind", ["llada", "dream"])
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
SEEDS = st.integers(0, 2**31)


@dataclass(frozen=True)
class Job:
    """One request's part of a step: what the package and the reference both need."""

    logits: torch.Tensor
    options: Options
    seed: int = 0
    step: int = 0
    steps: int = 8
    size: int = 32
    num_logprobs: int | None = None

    def candidates(self, kind: str) -> Candidates:
        o, traits = self.options, traits_of(kind, MASK)
        last = self.step >= self.steps - 1
        num = len(self.logits)
        return Candidates(
            num=num,
            count=traits.schedule.count(self.step, self.steps, num, self.size),
            rule=RULES[o.remasking or traits.default_remasking],
            commit_probability=1.0 if last else float(commit_fractions(self.steps)[self.step]),
            threshold=o.threshold,
            factor=o.factor,
            temperature=o.temperature,
            top_p=o.top_p,
            top_k=o.top_k,
            alg_temp=o.alg_temp,
            generator=torch.Generator().manual_seed(self.seed),
            num_logprobs=self.num_logprobs,
        )

    def naive(self, kind: str) -> tuple[list[int], list[bool]]:
        """Return the reference's tokens, and which of them it commits."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens, chosen = choose(
            self.logits.float(),
            reference_model(kind, VOCAB, MASK),
            replace(self.options, generator=generator),
            self.step,
            self.steps,
            self.size,
        )
        committed = torch.zeros(len(self.logits), dtype=torch.bool)
        committed[chosen] = True
        return tokens.tolist(), committed.tolist()


def run(kind: str, jobs: Sequence[Job], max_rows: int = 1 << 20) -> Commits:
    logits = torch.cat([job.logits for job in jobs])
    seen: list[int] = []

    def logits_of(start: int, end: int, index: torch.Tensor | None) -> torch.Tensor:
        rows = logits[start:end].clone() if index is None else logits[start:end][index]
        seen.append(len(rows))
        return rows

    commits = decide(logits_of, [job.candidates(kind) for job in jobs], kind, max_rows)
    assert max(seen) <= max_rows
    return commits


def decide(
    logits_of: LogitsOf, candidates: list[Candidates], kind: str, max_rows: int = 1 << 20
) -> Commits:
    arrays = HostArrays(torch.device("cpu"))
    plan = plan_step(candidates, max_rows, arrays)
    return denoise(logits_of, plan, MASK, traits_of(kind, MASK).sampler, arrays)


def split(commits: Commits, jobs: Sequence[Job]) -> list[tuple[list[int], list[bool]]]:
    """Return tokens and commits of each request."""
    ends = np.cumsum([len(job.logits) for job in jobs])[:-1]
    return [
        (tokens.tolist(), committed.tolist())
        for tokens, committed in zip(
            np.split(commits.tokens, ends), np.split(commits.committed, ends), strict=True
        )
    ]


def randn(seed: int, num: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


@st.composite
def jobs_of(draw: st.DrawFn, kind: str) -> Job:
    """Any request: any rule, number of commits and sampling, possibly with tied rows."""
    num = draw(st.integers(1, 12))
    logits = randn(draw(SEEDS), num)
    if num > 2 and draw(st.booleans()):
        logits[num // 2] = logits[0]  # an exact tie of confidences
        logits[-1] = logits[0]
    if draw(st.booleans()):
        logits[:, MASK] += 8.0
    values: dict[str, object] = {
        "remasking": draw(st.sampled_from([None, *RULES])),
        "temperature": draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        "top_p": draw(st.sampled_from([1.0, 0.3, 0.9])),
        "top_k": draw(st.sampled_from([0, 1, 5, VOCAB, 100])),
    }
    how = draw(st.sampled_from(["steps", "steps", "threshold", "factor", "alg_temp"]))
    if how == "threshold":
        values["threshold"] = draw(st.floats(0.01, 1.0))
    elif how == "factor":
        values["factor"] = draw(st.floats(0.01, 4.0))
    elif how == "alg_temp" and values["remasking"] != "origin":
        values["alg_temp"] = draw(st.sampled_from([0.1, 1.0]))
    job = Job(
        logits,
        Options(**values),  # type: ignore[arg-type]
        seed=draw(SEEDS),
        step=draw(st.integers(0, 12)),
        steps=draw(st.integers(1, 12)),
        size=draw(st.integers(num, 32)),
        num_logprobs=draw(st.none() | st.integers(0, 5)),
    )
    # A request whose step commits nothing, under fixed steps, is not in the batch.
    if job.candidates(kind).count == 0:
        job = replace(job, step=job.steps - 1, size=max(job.size, job.steps))
    return job


MIXES = st.sampled_from(["llada", "dream"]).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(jobs_of(kind), min_size=1, max_size=7))
)


@settings(max_examples=250)
@given(MIXES)
def test_a_mixed_batch_is_the_reference_one_at_a_time(mix: tuple[str, list[Job]]) -> None:
    kind, jobs = mix
    commits = run(kind, jobs)
    assert not commits.failed.any()
    for job, (tokens, committed) in zip(jobs, split(commits, jobs), strict=True):
        naive_tokens, naive_committed = job.naive(kind)
        assert committed == naive_committed
        assert tokens == naive_tokens
        assert any(committed) or job.options.remasking == "origin"
        assert MASK not in tokens


@settings(max_examples=100)
@given(MIXES, st.integers(1, 9))
def test_rows_at_a_time_do_not_matter(mix: tuple[str, list[Job]], max_rows: int) -> None:
    """However few rows of logits exist at a time, tokens, commits and log-probabilities agree."""
    kind, jobs = mix
    whole, pieces = run(kind, jobs), run(kind, jobs, max_rows)
    assert split(pieces, jobs) == split(whole, jobs)
    for own, other in zip(pieces.logprobs, whole.logprobs, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert np.array_equal(own.token_ids, other.token_ids)


@given(MIXES, SEEDS)
def test_the_company_does_not_matter(mix: tuple[str, list[Job]], seed: int) -> None:
    kind, jobs = mix
    order = np.random.default_rng(seed).permutation(len(jobs)).tolist()
    together = run(kind, jobs)
    shuffled = run(kind, [jobs[i] for i in order])
    parts = split(together, jobs)
    assert split(shuffled, [jobs[i] for i in order]) == [parts[i] for i in order]
    for number, job in enumerate(jobs):
        alone = run(kind, [job])
        assert split(alone, [job]) == [parts[number]]
        for other in (together.logprobs[number], shuffled.logprobs[order.index(number)]):
            own = alone.logprobs[0]
            assert (own is None) == (other is None) == (job.num_logprobs is None)
            if own is not None and other is not None:
                assert np.array_equal(own.token_ids, other.token_ids)
                assert np.array_equal(own.values, other.values)
                assert np.array_equal(own.ranks, other.ranks)


@KINDS
@EVERY_RULE
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (1.0, 1), (0.5, 0), (0.5, 1)])
def test_the_mask_id_is_never_committed(
    kind: str, rule: str, temperature: float, top_p: float, top_k: int
) -> None:
    """Even if it is by far the most probable token, or the only one that top-p or top-k leaves."""
    logits = randn(1, 6)
    logits[:, MASK] = 500.0
    options = Options(remasking=rule, temperature=temperature, top_p=top_p, top_k=top_k)
    job = Job(logits, options, step=7, steps=8, size=8 * 6)
    commits = run(kind, [job])
    assert not commits.failed.any()
    assert commits.committed.all()
    assert MASK not in commits.tokens
    if temperature == 0 or top_k == 1 or top_p < 1:  # the best of the others
        others = logits.clone()
        others[:, MASK] = -torch.inf
        assert commits.tokens.tolist() == others.argmax(-1).tolist()
        assert split(commits, [job]) == [job.naive(kind)]


BROKEN = {
    "nan": lambda row: row.__setitem__(5, torch.nan),
    "inf": lambda row: row.__setitem__(5, torch.inf),
    "all nan": lambda row: row.fill_(torch.nan),
    "all -inf": lambda row: row.fill_(-torch.inf),
    "nan of the mask id": lambda row: row.__setitem__(MASK, torch.nan),
}


@KINDS
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("values", [{}, {"threshold": 0.5}, {"factor": 1.0}, {"alg_temp": 0.5}])
def test_broken_logits_fail_their_own_request(
    kind: str, how: str, temperature: float, values: dict[str, float]
) -> None:
    options = Options(temperature=temperature, **values)  # type: ignore[arg-type]
    jobs = [
        Job(randn(number, num), options, seed=number, step=1, num_logprobs=2)
        for number, num in enumerate((3, 5, 4))
    ]
    expected = split(run(kind, jobs), jobs)
    broken = jobs[1].logits.clone()
    BROKEN[how](broken[3])
    commits = run(kind, [jobs[0], replace(jobs[1], logits=broken), jobs[2]])
    assert commits.failed.tolist() == [False, True, False]
    got = split(commits, jobs)
    assert (got[0], got[2]) == (expected[0], expected[2])


@KINDS
@EVERY_RULE
def test_every_rule_survives_broken_logits(kind: str, rule: str) -> None:
    jobs = [Job(randn(n, 4), Options(remasking=rule), seed=n, step=7) for n in range(2)]
    broken = torch.full_like(jobs[0].logits, torch.nan)
    commits = run(kind, [replace(jobs[0], logits=broken), jobs[1]])
    assert commits.failed.tolist() == [True, False]
    assert split(commits, jobs)[1] == jobs[1].naive(kind)


@KINDS
def test_tokens_that_the_model_rules_out_break_nothing(kind: str) -> None:
    logits = randn(0, 5)
    logits[:, 20:] = -torch.inf
    for temperature in (0.0, 1.0):
        for rule in RULES:
            job = Job(logits, Options(remasking=rule, temperature=temperature), step=7)
            commits = run(kind, [job])
            assert not commits.failed.any()
            assert split(commits, [job]) == [job.naive(kind)]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_read_only_and_of_any_dtype(kind: str, dtype: torch.dtype) -> None:
    """A4: confidences are computed in float32, whatever the model's dtype."""
    logits = randn(3, 9).to(dtype)
    before = logits.clone()
    for temperature in (0.0, 0.8):
        job = Job(logits.float(), Options(temperature=temperature), step=7)
        commits = decide(
            lambda start, end, index: logits[start:end].clone(), [job.candidates(kind)], kind
        )
        assert torch.equal(logits, before)
        assert split(commits, [job]) == [job.naive(kind)]


def test_confident_positions_are_told_apart() -> None:
    """Confidences near 1 at large logits are ranked as by softmax, to the last bit."""
    margins = torch.tensor([14.0, 13.5, 15.5, 13.0, 15.0, 14.5])
    logits = torch.full((6, VOCAB), -100.0)
    logits[:, 7], logits[:, 8] = 40.0, 40.0 - margins
    for steps in (6, 3):
        job = Job(logits, Options(), step=0, steps=steps, size=6)
        assert split(run("llada", [job]), [job]) == [job.naive("llada")]


# ------------------------------------------------------------------------------------ logprobs


@KINDS
@pytest.mark.parametrize("num_logprobs", [0, 1, 4, VOCAB, -1])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs(kind: str, num_logprobs: int, temperature: float) -> None:
    logits = randn(5, 8)
    logits[2, 10] = logits[2, 11] = 12.0  # ranks of ties
    job = Job(logits, Options(temperature=temperature), step=1, num_logprobs=num_logprobs, steps=4)
    plain = Job(randn(6, 3), Options(), step=1)
    commits = run(kind, [plain, job])
    assert commits.logprobs[0] is None
    own = commits.logprobs[1]
    assert own is not None
    rows = np.flatnonzero(commits.committed[3:])
    width = VOCAB if num_logprobs < 0 else num_logprobs
    assert own.token_ids.shape == own.values.shape == (len(rows), 1 + width)
    expected = torch.log_softmax(logits.double(), -1).numpy()
    for line, row in enumerate(rows.tolist()):
        token = commits.tokens[3 + row]
        assert own.token_ids[line, 0] == token
        assert own.ranks[line] == (logits[row] >= logits[row, token]).sum()
        np.testing.assert_allclose(
            own.values[line], expected[row, own.token_ids[line]], rtol=1e-5, atol=1e-6
        )
        best = np.sort(expected[row])[::-1][:width]
        np.testing.assert_allclose(own.values[line, 1:], best, rtol=1e-5, atol=1e-6)


def test_logprobs_that_wait_to_be_read_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no more than a chunk of logits, unless those of one request alone take more."""
    read: list[int] = []

    def recorded(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        read.append(sum(tensor.numel() for tensor in tensors))
        return read_back(tensors)

    monkeypatch.setattr("vllm_sparse_dllm.denoise.step.read_back", recorded)
    jobs = [
        Job(randn(number, 4), Options(), step=0, num_logprobs=-1, steps=4, size=4)
        for number in range(5)
    ]
    commits = run("llada", jobs, max_rows=3)
    assert all(own is not None and own.values.shape == (1, 1 + VOCAB) for own in commits.logprobs)
    _, *of_logprobs = read
    # Each request commits one row: its ids, its values and its rank.
    assert of_logprobs == [2 * (1 + VOCAB) + 1] * len(jobs)


@KINDS
def test_logprobs_of_no_commit_are_empty(kind: str) -> None:
    """Under ``origin`` a step may commit nothing."""
    for seed in range(50):
        options = Options(remasking="origin")
        job = Job(randn(1, 2), options, seed=seed, steps=50, num_logprobs=3)
        commits = run(kind, [job])
        if not commits.committed.any():
            assert commits.logprobs[0] is not None
            assert commits.logprobs[0].values.shape == (0, 4)
            return
    raise AssertionError("no draw without a commit")


# ------------------------------------------------------------------------------ counts and cuts


#: Confidences with exact ties, and values that thresholds hit exactly.
CONFIDENCES = st.lists(
    st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 0.75, 0.9, 1.0]) | st.floats(0, 1, width=32),
    min_size=1,
    max_size=20,
).map(lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float32))


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(CONFIDENCES, st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0]) | st.floats(0.001, 1)),
        min_size=1,
        max_size=5,
    )
)
def test_threshold_counts(rows: list[tuple[torch.Tensor, float]]) -> None:
    thresholds = torch.tensor([threshold for _, threshold in rows])
    got = threshold_counts(padded([ordered for ordered, _ in rows]), thresholds)
    assert got.tolist() == [at_threshold(ordered, threshold) for ordered, threshold in rows]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(CONFIDENCES, st.sampled_from([0.5, 1.0, 2.0, 3.0, 100.0]) | st.floats(0.001, 30)),
        min_size=1,
        max_size=5,
    )
)
def test_factor_counts(rows: list[tuple[torch.Tensor, float]]) -> None:
    factors = torch.tensor([factor for _, factor in rows], dtype=torch.float64)
    sizes = torch.tensor([len(ordered) for ordered, _ in rows])
    got = factor_counts(padded([ordered for ordered, _ in rows]), factors, sizes)
    assert got.tolist() == [at_factor(ordered, factor) for ordered, factor in rows]
    assert all(1 <= count <= size for count, size in zip(got.tolist(), sizes.tolist(), strict=True))


def test_factor_quirk() -> None:
    """B4: a lone candidate commits, of two both; if only the last one fails, it commits too."""

    def count(*values: float) -> int:
        ordered = torch.tensor([values])
        return int(factor_counts(ordered, torch.tensor([1.0]), torch.tensor([len(values)])))

    assert count(0.0) == 1
    assert count(0.1, 0.0) == 2
    assert count(0.9, 0.9, 0.0) == 3
    assert count(0.9, 0.1, 0.0) == 1
    assert count(0.9, 0.9, 0.1, 0.0) == 2


def test_restrict_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()

    def kept(top_p: float, top_k: int) -> list[int]:
        return torch.isfinite(restrict(logits, top_p, top_k))[0].nonzero()[:, 0].tolist()

    assert kept(1.0, 0) == kept(1.0, 4) == kept(1.0, 99) == [0, 1, 2, 3]
    assert kept(0.4, 0) == kept(1.0, 1) == [0]
    assert kept(0.7, 0) == [0, 1]
    assert kept(0.9, 2) == [0, 1]
    assert kept(1e-9, 0) == [0]
    assert kept(1.0, 3) == [0, 1, 2, 3]  # ties with the k-th are kept


@settings(max_examples=600)
@given(
    rows=st.integers(1, 9).flatmap(
        lambda vocab: st.lists(
            st.lists(st.integers(0, 3), min_size=vocab, max_size=vocab).filter(any),
            min_size=1,
            max_size=3,
        )
    ),
    part=st.floats(0, 1, exclude_max=True),
    top_k=st.just(0) | st.integers(1, 10),
    few=st.integers(1, 10),
)
def test_restrict_is_exact_however_few_tokens_it_sorts(
    rows: list[list[int]], part: float, top_k: int, few: int
) -> None:
    """Against exact sums of integer weights; 0 is a token that is excluded already."""
    top_p = (int(part * sum(rows[0])) + 0.5) / sum(rows[0])  # between two sums of the first row
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_FEW_TOKENS", few)
        got = restrict(torch.tensor(rows).log(), top_p, top_k)
    for weights, kept in zip(rows, torch.isfinite(got).tolist(), strict=True):
        order = sorted(range(len(weights)), key=lambda token: -weights[token])
        if abs(top_p * sum(weights) % 1) < 1e-5:
            continue
        before, nucleus = 0, set()
        for token in order:
            if before <= top_p * sum(weights):
                nucleus.add(token)
            before += weights[token]
        if 0 < top_k < len(weights):
            least = sorted((weights[t] if t in nucleus else 0 for t in order), reverse=True)
            nucleus = {t for t in nucleus if weights[t] >= least[top_k - 1]}
        assert {t for t, own in enumerate(kept) if own} == {t for t in nucleus if weights[t]}


@KINDS
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_draws_follow_the_distribution(kind: str, temperature: float) -> None:
    """Both samplers are exact: Gumbel-max and categorical draw from softmax(logits / T)."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 50.0, -1.0, 0.5]])
    logits = logits.repeat(20_000, 1)
    job = Job(logits, Options(temperature=temperature), seed=11)
    candidates = job.candidates(kind)
    tokens, _ = traits_of(kind, MASK).sampler.draw(
        logits, MASK, temperature, 1.0, 0, candidates.generator
    )
    weights = logits[0].clone()
    weights[MASK] = -torch.inf
    expected = torch.softmax(weights / temperature, -1)
    got = torch.bincount(tokens, minlength=6) / len(tokens)
    assert got[MASK] == 0
    torch.testing.assert_close(got, expected, rtol=0, atol=0.015)
