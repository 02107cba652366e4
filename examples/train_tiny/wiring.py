# SPDX-License-Identifier: Apache-2.0
"""Initial weights for training: two or three layers as an induction circuit, all else random.

From random weights, a network does not learn to look up a word by the word before it within the
minutes that a small machine can spend. So heads of layer 0 start by attending to a neighbour by
its position and writing its token into a part of the residual stream that is theirs; heads of
later layers start by attending to positions where such a part equals a part of the query, and
copying the token there; and the LM head reads what they copy. Training changes all of these
weights. The embedding's first dimension starts as a constant, which lets heads attend by position
independently of the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from network import Attention, Network, Shape
from torch import Tensor

#: Number of the part that holds the position's own token.
_OWN = -1


@dataclass(frozen=True)
class Circuit:
    """The function of each head in a family's initial circuit.

    Attributes:
        offsets: For each wired head of layer 0, the relative position of its neighbour.
        matches: By layer and head: the part of the query and the part of the key that are matched.
            A part is that of a head of layer 0, or the position's own token. Heads that share a
            key/value head have the same key.
        masks_match: Whether masks are matched like any other token. If not, they add nothing to
            the products of queries and keys, by which caches choose.
    """

    offsets: tuple[int, ...]
    matches: Mapping[int, Mapping[int, tuple[int, int]]]
    masks_match: bool


#: The token at a mask is predicted by LLaDA's logits at that position, by Dream's at the position
#: before. So LLaDA's query uses its two neighbours, Dream's its own token and the next but one.
#: Dream has two key/value heads and therefore matches in two layers: each layer leaves one of them
#: free, whose keys can encode other things, such as being in a list. (In the second of these
#: layers, the part of the own token also holds what the first has copied, which costs the
#: untrained circuit some of its answers.)
CIRCUITS = {
    "llada": Circuit((-1, 1, -2), {1: {0: (0, 0), 1: (1, 1), 2: (0, 1)}}, masks_match=True),
    "dream": Circuit(
        (-1, 1, 2), {1: {0: (_OWN, 0)}, 2: {0: (2, 1), 1: (_OWN, 1)}}, masks_match=False
    ),
}
CONSTANT = 4.0
#: Number of fast rotary pairs, which distinguish neighbouring positions.
_NUM_FAST = 6
_WRITE, _MATCH, _COPY, _READ = 2.0, 2.0, 2.0, 0.8
#: The own token is unamplified in the residual stream; this gain makes it as large as a
#: neighbour's part.
_OWN_GAIN = 3.5
#: Query and key weights that push attention logits down where the key is a mask.
_MASK_QUERY, _MASK_KEY = 5.0, -11.0


@torch.no_grad()
def wire(network: Network, mask_id: int) -> None:
    """Wire the circuit: overwrite weights of embedding, LM head and the circuit's attention layers.

    Raises:
        ValueError: If the network has too few layers, or is too narrow for the parts.
    """
    shape = network.shape
    circuit = CIRCUITS[shape.family]
    size, heads, last = shape.head_size, len(circuit.offsets), max(circuit.matches)
    if shape.width < (heads + 1) * size or shape.layers <= last:
        raise ValueError(
            f"a wired start needs {last + 1} layers and width >= {(heads + 1) * size}, "
            f"got {shape.layers} and {shape.width}"
        )
    network.embedding.weight[:, 0] = CONSTANT
    _wire_neighbours(network, circuit.offsets)
    mask = network.embedding.weight[mask_id]
    for layer in circuit.matches:
        _wire_matches(network.blocks[layer].attention, circuit, layer, mask)
    network.head.weight.zero_()
    network.head.weight[:, 1:size] = _READ * network.embedding.weight[:, 1:size]
    network.head.weight[mask_id] = 0.0


def _part(shape: Shape, number: int) -> slice:
    """Return a part's dimensions in the residual stream: the own token's, then each neighbour's."""
    start = (number + 1) * shape.head_size
    return slice(start, start + shape.head_size)


def _token(shape: Shape) -> Tensor:
    """Return the projection that reads the own token, without the constant: [head, width]."""
    projection = torch.zeros(shape.head_size, shape.width)
    projection[1:, 1 : shape.head_size] = torch.eye(shape.head_size - 1)
    return projection


def _wire_neighbours(network: Network, offsets: tuple[int, ...]) -> None:
    shape, attention = network.shape, network.blocks[0].attention
    size, half = shape.head_size, shape.head_size // 2
    pairs = torch.arange(_NUM_FAST)
    angles = shape.rope_theta ** (-2.0 * pairs / size)
    for weight in (attention.q.weight, attention.k.weight):
        weight.mul_(0.2)
    for kv_head in range(shape.kv_heads):
        rows = slice(kv_head * size, (kv_head + 1) * size)
        attention.k.weight[rows, 0] = 0.0
        attention.k.weight[kv_head * size + pairs, 0] = 1.0
        attention.v.weight[rows] = _token(shape)
    for head, offset in enumerate(offsets):
        attention.q.weight[head * size : (head + 1) * size, 0] = 0.0
        # A query rotated by `offset` positions matches the key at that distance.
        attention.q.weight[head * size + pairs, 0] = torch.cos(offset * angles)
        attention.q.weight[head * size + half + pairs, 0] = torch.sin(offset * angles)
        attention.o.weight[:, head * size : (head + 1) * size] = 0.0
        attention.o.weight[_part(shape, head), head * size : (head + 1) * size] = (
            _WRITE * torch.eye(size)
        )


def _wire_matches(attention: Attention, circuit: Circuit, layer: int, mask_token: Tensor) -> None:
    shape = attention.shape
    size, half = shape.head_size, shape.head_size // 2
    # Match in the slow rotary pairs only, whose angles hardly depend on the distance.
    slow = torch.zeros(size)
    slow[half // 2 : half] = slow[half + half // 2 :] = 1.0
    mask = torch.zeros(shape.width)
    mask[1:size] = mask_token[1:size]
    matched = torch.diag(slow)
    if not circuit.masks_match:
        matched @= torch.eye(size) - torch.outer(mask, mask)[:size, :size] / mask.square().sum()
    for weight in (attention.q.weight, attention.k.weight):
        weight.mul_(0.1)
        weight[:, 0] = 0.0
    for head, (query, key) in circuit.matches[layer].items():
        kv_head = head // (shape.heads // shape.kv_heads)
        for weight, number, part in (
            (attention.q.weight, head, query),
            (attention.k.weight, kv_head, key),
        ):
            rows = slice(number * size, (number + 1) * size)
            gain = _OWN_GAIN if part == _OWN else 1.0
            weight[rows, _part(shape, part)] = _MATCH * gain * matched
            weight[rows, 0] = 0.0
        # The slowest pair pushes down the logits of keys that are masks.
        attention.q.weight[head * size + half - 1] = 0.0
        attention.q.weight[head * size + half - 1, 0] = _MASK_QUERY
        attention.k.weight[kv_head * size + half - 1] = _MASK_KEY * mask / mask.square().sum()
        attention.v.weight[kv_head * size : (kv_head + 1) * size] = _token(shape)
        attention.o.weight[:, head * size : (head + 1) * size] = 0.0
        attention.o.weight[:size, head * size : (head + 1) * size] = _COPY * torch.eye(size)
