# SPDX-License-Identifier: Apache-2.0
"""What the unmasking rules need from rows of logits, without storing probabilities.

One pass over the vocabulary gives the most probable token, its probability and the margin between
the two largest probabilities; the entropy, whose formula takes logarithms of the probabilities
themselves, needs a second pass. Rows are cut into pieces of a fixed size, one per program, so that
a few rows fill the device and results do not depend on the number of rows.
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
    """Return the largest and the second largest of values; the same if the largest occurs twice."""
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
        # The first on ties, as in argmax.
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
    # Pieces are in the vocabulary's order: take the first that holds the best.
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


# `first` and `total` are rows of one tensor, and `rows` is packed with other arrays: their
# alignment varies from step to step, and the kernel would be compiled anew for each.
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
    """Statistics of rows of logits for the unmasking rules; NaN where a row is unusable.

    Attributes:
        tokens: ``[n]`` most probable token that is not the mask id, the first on ties.
        probability: ``[n]`` float32 probability of that token.
        margin: ``[n]`` float32, largest minus second largest probability of all tokens.
        largest: ``[n]`` float32 largest logit.
        total: ``[n]`` float32 sum of the exponentials of logits minus the largest one.
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
        logits: ``[n, vocab]`` in any floating dtype, contiguous within each row.
        mask_token_id: Never chosen as the most probable token.
        piece: Logits per program; fixed, so that sums do not depend on the batch.
        block: Logits that a program loads at a time; divides ``piece``.
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
        logits: ``[n, vocab]`` that the statistics were computed from.
        statistics: Statistics of all rows.
        rows: ``[m]`` int64, which rows.
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
