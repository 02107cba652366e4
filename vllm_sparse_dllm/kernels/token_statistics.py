# SPDX-License-Identifier: Apache-2.0
"""What the unmasking rules need of rows of logits, without their probabilities.

One pass over the vocabulary gives the most probable token, its probability and its lead over the
second; the entropy, whose formula has the probabilities themselves in a logarithm, takes a
second pass. A row is cut into pieces of a fixed size, each a program, so that few rows fill the
device and results do not depend on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_PIECE = 16384
_BLOCK = 2048


@triton.jit
def _largest_two(values):
    """Return the largest of values, and the largest but for one place where that is."""
    largest = tl.max(values, 0)
    is_largest = values == largest
    rest = tl.max(tl.where(is_largest, float("-inf"), values), 0)
    return largest, tl.where(tl.sum(is_largest.to(tl.int32), 0) > 1, largest, rest)


@triton.jit(do_not_specialize=["mask_token_id"])
def statistics_kernel(
    logits,
    pieces,
    tokens,
    row_stride,
    vocab,
    mask_token_id,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    logits += row * row_stride
    first = float("-inf")
    second = float("-inf")
    best = float("-inf")
    token = 0
    total = 0.0
    for start in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, vocab), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        own_first, own_second = _largest_two(values)
        allowed = tl.where(ids == mask_token_id, float("-inf"), values)
        own_best = tl.max(allowed, 0)
        own_token = tl.min(tl.where(allowed == own_best, ids, vocab - 1), 0)
        # The first on ties, as argmax has it.
        token = tl.where(own_best > best, own_token, token)
        best = tl.maximum(best, own_best)
        second = tl.maximum(tl.minimum(first, own_first), tl.maximum(second, own_second))
        new_first = tl.maximum(first, own_first)
        base = tl.where(new_first == float("-inf"), 0.0, new_first)
        total = total * tl.exp(first - base) + tl.sum(tl.exp(values - base), 0)
        first = new_first
    number = row * tl.num_programs(1) + piece
    tl.store(pieces + 4 * number, first)
    tl.store(pieces + 4 * number + 1, second)
    tl.store(pieces + 4 * number + 2, best)
    tl.store(pieces + 4 * number + 3, total)
    tl.store(tokens + number, token)


@triton.jit(do_not_specialize=["num_rows", "num_pieces"])
def join_pieces_kernel(
    pieces,
    piece_tokens,
    tokens,
    results,
    num_rows,
    num_pieces,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCK)
    inside = numbers < num_pieces
    pieces += 4 * row * num_pieces
    minus = float("-inf")
    firsts = tl.load(pieces + 4 * numbers, mask=inside, other=minus)
    seconds = tl.load(pieces + 4 * numbers + 1, mask=inside, other=minus)
    bests = tl.load(pieces + 4 * numbers + 2, mask=inside, other=minus)
    totals = tl.load(pieces + 4 * numbers + 3, mask=inside, other=0.0)
    own_tokens = tl.load(piece_tokens + row * num_pieces + numbers, mask=inside, other=0)
    first, second = _largest_two(firsts)
    second = tl.maximum(second, tl.max(seconds, 0))
    best = tl.max(bests, 0)
    # Pieces lie in the vocabulary's order: of those that hold the best, the first.
    piece = tl.min(tl.where((bests == best) & inside, numbers, BLOCK - 1), 0)
    token = tl.sum(tl.where(numbers == piece, own_tokens, 0), 0)
    base = tl.where(first == minus, 0.0, first)
    total = tl.sum(totals * tl.exp(firsts - base), 0)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(results + row, tl.div_rn(tl.exp(best - first), total))
    tl.store(results + num_rows + row, first)
    tl.store(results + 2 * num_rows + row, total)
    tl.store(
        results + 3 * num_rows + row,
        tl.div_rn(tl.exp(first - first), total) - tl.div_rn(tl.exp(second - first), total),
    )


# `first` and `total` are rows of one tensor, `rows` lies among other arrays: their alignment
# varies from step to step, and each would be compiled anew.
@triton.jit(do_not_specialize_on_alignment=["rows", "first", "total"])
def entropy_kernel(
    logits,
    rows,
    first,
    total,
    sums,
    row_stride,
    vocab,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.load(rows + tl.program_id(0))
    piece = tl.program_id(1)
    base = tl.load(first + row)
    scale = tl.load(total + row)
    logits += row * row_stride
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(piece * PIECE, tl.minimum((piece + 1) * PIECE, vocab), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        values = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        probabilities = tl.exp(values - base) / scale
        acc += probabilities * tl.log(probabilities + 1e-10)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + piece, tl.sum(acc, 0))


@dataclass(frozen=True)
class TokenStatistics:
    """Rows of logits, as the rules see them; NaN where a row is unusable.

    Attributes:
        tokens: ``[n]`` most probable token that is not the mask id, the first on ties.
        probability: ``[n]`` float32, of that token.
        margin: ``[n]`` float32, largest minus second largest probability of all tokens.
        largest: ``[n]`` float32 largest logit.
        total: ``[n]`` float32 sum of the exponentials of logits less the largest.
    """

    tokens: torch.Tensor
    probability: torch.Tensor
    margin: torch.Tensor
    largest: torch.Tensor
    total: torch.Tensor


def token_statistics(
    logits: torch.Tensor, mask_token_id: int, piece: int = _PIECE, block: int = _BLOCK
) -> TokenStatistics:
    """Return the statistics of rows of logits, computed in float32.

    Args:
        logits: ``[n, vocab]`` in any floating dtype, a row side by side.
        mask_token_id: Never the most probable token.
        piece: Logits of a program; fixed, so that sums do not depend on the batch.
        block: Logits of a program at a time; divides ``piece``.
    """
    num_rows, vocab = logits.shape
    num_pieces = triton.cdiv(vocab, piece)
    device = logits.device
    pieces = torch.empty(num_rows * num_pieces * 4, dtype=torch.float32, device=device)
    piece_tokens = torch.empty(num_rows * num_pieces, dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    results = torch.empty(4, num_rows, dtype=torch.float32, device=device)
    if num_rows:
        statistics_kernel[(num_rows, num_pieces)](
            logits,
            pieces,
            piece_tokens,
            logits.stride(0),
            vocab,
            mask_token_id,
            PIECE=piece,
            BLOCK=block,
            num_warps=8,
        )
        join_pieces_kernel[(num_rows,)](
            pieces,
            piece_tokens,
            tokens,
            results,
            num_rows,
            num_pieces,
            BLOCK=triton.next_power_of_2(num_pieces),
            num_warps=1,
        )
    probability, largest, total, margin = results
    return TokenStatistics(tokens, probability, margin, largest, total)


def negative_entropy(
    logits: torch.Tensor,
    statistics: TokenStatistics,
    rows: torch.Tensor,
    piece: int = _PIECE,
    block: int = _BLOCK,
) -> torch.Tensor:
    """Return ``[m]`` sums of ``p * log(p + 1e-10)`` of some rows.

    Args:
        logits: ``[n, vocab]``, those of the statistics.
        statistics: Of all rows.
        rows: ``[m]`` int64.
        piece: As in `token_statistics`.
        block: As in `token_statistics`.
    """
    vocab, num_rows = logits.shape[1], rows.shape[0]
    num_pieces = triton.cdiv(vocab, piece)
    sums = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    if num_rows:
        entropy_kernel[(num_rows, num_pieces)](
            logits,
            rows,
            statistics.largest,
            statistics.total,
            sums,
            logits.stride(0),
            vocab,
            PIECE=piece,
            BLOCK=block,
            num_warps=8,
        )
    return sums.sum(dim=1)
