# SPDX-License-Identifier: Apache-2.0
"""A start for training: the first two layers as an induction circuit, all else random.

From random weights alone, looking a word up by the word before it does not form within the
minutes that a small machine can spend. So layer 0 starts with heads that attend to a neighbour by
its position and write what it is into a part of the residual stream of their own; layer 1 with
heads that attend to where such a part equals one of the query, and copy the token there; and the
LM head reads what they copy. Training changes all of it. The embedding's first dimension starts
as a constant, from which positions can be told without regard to the token.
"""

from __future__ import annotations

import torch
from network import Network, Shape
from torch import Tensor

#: Of a mask position LLaDA's logits are that position's, Dream's those of the one before. So
#: LLaDA's query knows its neighbours, Dream's itself and the next but one.
#: Heads of layer 0: the neighbour that each attends to.
_OFFSETS = {"llada": (-1, 1, -2), "dream": (-1, 1, 2)}
#: Heads of layer 1: part of the query, part of the key; a part is a head of layer 0 or the
#: position's own token. Heads of one key/value head have the same key.
_OWN = -1
_MATCHES = {
    "llada": {0: (0, 0), 1: (1, 1), 2: (0, 1)},
    "dream": {0: (_OWN, 0), 2: (2, 1), 3: (_OWN, 1)},
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
    """Overwrite embedding, LM head and the attention of layers 0 and 1.

    Raises:
        ValueError: If the network is too narrow for the parts.
    """
    shape = network.shape
    size, heads = shape.head_size, len(_OFFSETS[shape.family])
    if shape.width < (heads + 1) * size or shape.layers < 2:
        raise ValueError(
            f"a wired start needs two layers and width >= {(heads + 1) * size}, "
            f"got {shape.layers} and {shape.width}"
        )
    network.embedding.weight[:, 0] = CONSTANT
    _wire_neighbours(network, _OFFSETS[shape.family])
    _wire_matches(network, _MATCHES[shape.family], mask_id)
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


def _wire_matches(network: Network, matches: dict[int, tuple[int, int]], mask_id: int) -> None:
    shape, attention = network.shape, network.blocks[1].attention
    size, half = shape.head_size, shape.head_size // 2
    # Only the slow rotary pairs, whose angle says little of the distance.
    slow = torch.zeros(size)
    slow[half // 2 : half] = slow[half + half // 2 :] = 1.0
    mask = torch.zeros(shape.width)
    mask[1:size] = network.embedding.weight[mask_id, 1:size]
    for weight in (attention.q.weight, attention.k.weight):
        weight.mul_(0.1)
        weight[:, 0] = 0.0
    for head, (query, key) in matches.items():
        kv_head = head // (shape.heads // shape.kv_heads)
        for weight, number, part in (
            (attention.q.weight, head, query),
            (attention.k.weight, kv_head, key),
        ):
            rows = slice(number * size, (number + 1) * size)
            gain = _OWN_GAIN if part == _OWN else 1.0
            weight[rows, _part(shape, part)] = _MATCH * gain * torch.diag(slow)
            weight[rows, 0] = 0.0
        # The slowest pair pushes keys down that are masks.
        attention.q.weight[head * size + half - 1] = 0.0
        attention.q.weight[head * size + half - 1, 0] = _MASK_QUERY
        attention.k.weight[kv_head * size + half - 1] = _MASK_KEY * mask / mask.square().sum()
        attention.v.weight[kv_head * size : (kv_head + 1) * size] = _token(shape)
        attention.o.weight[:, head * size : (head + 1) * size] = 0.0
        attention.o.weight[:size, head * size : (head + 1) * size] = _COPY * torch.eye(size)
