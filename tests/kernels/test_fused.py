# SPDX-License-Identifier: Apache-2.0
"""A denoising step with the confidences of fused kernels, against the same step without them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_dllm.denoise.fused import FusedDistribution, greedy_distribution
from vllm_sparse_dllm.denoise.plan import Candidates, plan_step
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.denoise.sampling import (
    CategoricalSampler,
    GumbelSampler,
    TokenDistribution,
    greedy_tokens,
)
from vllm_sparse_dllm.denoise.step import Commits, GreedyDistribution, denoise
from vllm_sparse_dllm.transfer import HostArrays

VOCAB, MASK = 53, 3


@dataclass(frozen=True)
class RuleOut:
    """An edit that rules a token out in all rows of a request."""

    token: int

    def apply(self, logits: torch.Tensor, first: int) -> None:
        logits[:, self.token] = -torch.inf


@dataclass(frozen=True)
class Request:
    """A request's parameters for a step."""

    rule: str
    num: int
    count: int = 1
    temperature: float = 0.0
    threshold: float | None = None
    edit: bool = False
    seed: int = 0
    edits: tuple[RuleOut, ...] = field(default=(RuleOut(5),), init=False)

    def candidates(self, device: torch.device) -> Candidates:
        """Return the request as input of a step, with a generator of its own."""
        return Candidates(
            num=self.num,
            count=min(self.count, self.num),
            rule=RULES[self.rule],
            commit_probability=0.5,
            threshold=self.threshold,
            factor=None,
            temperature=self.temperature,
            top_p=1.0,
            top_k=0,
            alg_temp=0.0,
            generator=torch.Generator(device).manual_seed(self.seed),
            num_logprobs=None,
            edits=self.edits if self.edit else (),
            traced=True,
        )


REQUESTS = st.builds(
    Request,
    rule=st.sampled_from(sorted(RULES)),
    num=st.integers(1, 9),
    count=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
    threshold=st.sampled_from([None, None, 0.3]),
    edit=st.booleans(),
    seed=st.integers(0, 99),
)


def run(
    logits: torch.Tensor, requests: list[Request], max_rows: int, greedy: GreedyDistribution | None
) -> Commits:
    arrays = HostArrays(logits.device)
    plan = plan_step(
        [request.candidates(logits.device) for request in requests],
        max_rows,
        arrays,
        fused=greedy is not None,
    )
    arrays.send()
    return denoise(
        lambda start, end, index: logits[start:end].clone(),
        plan,
        MASK,
        GumbelSampler() if requests[0].seed % 2 else CategoricalSampler(),
        arrays,
        greedy,
    )


@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=4),
    max_rows=st.sampled_from([4, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_a_step_decides_the_same(
    device: torch.device,
    requests: list[Request],
    max_rows: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    rows = sum(request.num for request in requests)
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, VOCAB, generator=generator)).to(device, dtype)
    plain = run(logits, requests, max_rows, None)
    fused = run(logits, requests, max_rows, greedy_distribution(device))
    assert np.array_equal(plain.tokens, fused.tokens)
    assert np.array_equal(plain.committed, fused.committed)
    assert not plain.failed.any() and not fused.failed.any()
    np.testing.assert_allclose(fused.confidences, plain.confidences, rtol=3e-6, atol=1e-6)


def test_one_requests_garbage_fails_it_alone(device: torch.device) -> None:
    requests = [Request("entropy", 3), Request("topk_margin", 2), Request("low_confidence", 4)]
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1)).to(device)
    logits[4, 7] = torch.nan
    commits = run(logits, requests, 64, greedy_distribution(device))
    assert commits.failed.tolist() == [False, True, False]
    healthy = run(logits, requests, 64, None)
    assert np.array_equal(commits.committed[5:], healthy.committed[5:])


def test_a_greedy_request_gets_the_same_beside_one_that_draws(device: torch.device) -> None:
    """Bit for bit: its rows take the same code path, whatever else is in the batch."""
    greedy, drawing = Request("entropy", 5), Request("entropy", 3, temperature=0.7)
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(2)).to(device)
    fused = greedy_distribution(device)
    together = run(logits, [greedy, drawing], 64, fused)
    alone = run(logits[:5], [greedy], 64, fused)
    assert together.confidences is not None and alone.confidences is not None
    assert np.array_equal(together.confidences[:5], alone.confidences)


def test_some_of_the_rows(device: torch.device) -> None:
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(3)).to(device)
    whole = FusedDistribution(logits, MASK)
    assert whole.rows(torch.arange(7, device=device)) is whole
    plain = TokenDistribution(logits, greedy_tokens(logits, MASK))
    once = torch.tensor([6, 0, 3], device=device)
    twice = torch.tensor([2, 1], device=device)
    for own, twin in (
        (whole.rows(once), plain.rows(once)),
        (whole.rows(once).rows(twice), plain.rows(once).rows(twice)),
    ):
        assert torch.equal(own.tokens, twin.tokens)
        for rule in ("low_confidence", "topk_margin", "entropy"):
            confidence = RULES[rule].confidence
            assert confidence is not None
            torch.testing.assert_close(confidence(own), confidence(twin))
