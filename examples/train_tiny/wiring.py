# SPDX-License-Identifier: Apache-2.0
"""A start for training: two or three layers as an induction circuit, all else random.

From random weights alone, looking a word up by the word before it does not form within the
minutes that a small machine can spend. So layer 0 starts with heads that attend to a neighbour by
its position and write what it is into a part of the residual stream of their own; later ones with
heads that attend to where such a part equals one of the query, and copy the token there; and the
LM head reads what they copy. Training changes all of it. The embedding's first dimension starts
as a constant, from which positions can be told without regard to the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from network import Attention, Network, Shape
from torch import Tensor

#: The position's own token, as a part.
_OWN = -1


@dataclass(frozen=True)
class Circuit:
    """What a family's heads do.

    Attributes:
        offsets: Heads of layer 0: the neighbour that each attends to.
        matches: Heads of later layers: part of the query, part of the key; a part is a head of
            layer 0 or the position's own token. Heads of one key/value head have the same key.
        masks_match: Whether a mask in the query's part is matched like any token. If not, it adds
            nothing to the products with keys, by which caches choose.
    """

    offsets: tuple[int, ...]
    matches: Mapping[int, Mapping[int, tuple[int, int]]]
    masks_match: bool


#: Of a mask position LLaDA's logits are that position's, Dream's those of the one before. So
#: LLaDA's query knows its neighbours, Dream's itself and the next but one. Dream has two
#: key/value heads, so it matches in two layers: each has a free one, whose keys can tell what
#: else they are, such as a list's. (In the second of them the own part holds what the first has
#: copied, too, which costs the untrained circuit some of its answers.)
CIRCUITS = {
    "llada": Circuit((-1, 1, -2), {1: {0: (0, 0), 1: (1, 1), 2: (0, 1)}}, masks_match=True),
    "dream": Circuit(
        (-1, 1, 2), {1: {0: (_OWN, 0)}, 2: {0: (2, 1), 1: (_OWN, 1)}}, masks_match=False
    ),
}
CONSTANT = 4.0
#: Rotary pairs that tell neighbours apart.
_NUM_FAST = 6
_WRITE, _MATCH, _COPY, _READ = 2.0, 2.0, 2.0, 0.8
#: The own token is in the stream unamplified: what makes it as large as a neighbour's part.
_OWN_GAIN = 3.5
#: How far logits are pushed down where the key is a mask.
_MASK_QUERY, _MASK_KEY = 5.0, -11.0


@torch.no_grad()
def wire(network: Network, mask_id: int) -> None:
    """Overwrite embedding, LM head and the attention of layer 0 and of those that match.

    Raises:
        ValueError: If the network is too narrow for the parts.
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
    """Dimensions of the residual stream: the own token first, then a part a neighbour."""
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
        # A query turned by `offset` positions meets its key there.
        attention.q.weight[head * size + pairs, 0] = torch.cos(offset * angles)
        attention.q.weight[head * size + half + pairs, 0] = torch.sin(offset * angles)
        attention.o.weight[:, head * size : (head + 1) * size] = 0.0
        attention.o.weight[_part(shape, head), head * size : (head + 1) * size] = (
            _WRITE * torch.eye(size)
        )


def _wire_matches(attention: Attention, circuit: Circuit, layer: int, mask_token: Tensor) -> None:
    shape = attention.shape
    size, half = shape.head_size, shape.head_size // 2
    # Only the slow rotary pairs, whose angle says little of the distance.
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
        # The slowest pair pushes keys down that are masks.
        attention.q.weight[head * size + half - 1] = 0.0
        attention.q.weight[head * size + half - 1, 0] = _MASK_QUERY
        attention.k.weight[kv_head * size + half - 1] = _MASK_KEY * mask / mask.square().sum()
        attention.v.weight[kv_head * size : (kv_head + 1) * size] = _token(shape)
        attention.o.weight[:, head * size : (head + 1) * size] = 0.0
        attention.o.weight[:size, head * size : (head + 1) * size] = _COPY * torch.eye(size)
