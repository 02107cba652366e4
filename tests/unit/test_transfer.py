# SPDX-License-Identifier: Apache-2.0
"""Host arrays go to the device in one copy, tensors come back in one.

Host memory to which arrays are copied all the same (``staged``) stands in for a device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_dllm import transfer
from vllm_sparse_dllm.attention.packing import PackedArrays, pack
from vllm_sparse_dllm.transfer import HostArrays, read_back

CPU = torch.device("cpu")
DTYPES = (np.bool_, np.int32, np.int64, np.float32, np.float64)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each copy appends its number of bytes."""
    sizes: list[int] = []
    send = transfer._Buffer.send

    def counted(self: transfer._Buffer) -> None:
        if self.used > self.sent and self._host is not None:
            sizes.append(self.used - self.sent)
        send(self)

    monkeypatch.setattr(transfer._Buffer, "send", counted)
    return sizes


ARRAYS = st.lists(
    st.tuples(
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
        st.integers(0, 99),
    ),
    min_size=1,
    max_size=8,
)


def numbers(dtype: type[np.generic], shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(dtype)


@given(st.lists(ARRAYS, min_size=1, max_size=5), st.sampled_from([16, 64, 4096]), st.booleans())
def test_what_is_put_arrives(rounds: list[list], capacity: int, staged: bool) -> None:
    arrays = HostArrays(CPU, capacity, staged=staged)
    for own in rounds:
        arrays.begin()
        given_arrays = [numbers(*each) for each in own]
        views = [arrays.put(array, array.dtype) for array in given_arrays]
        half = len(views) // 2
        arrays.send()
        # Arrays put after a copy go with the next one; those sent before keep their values.
        given_arrays += given_arrays[:half]
        views += [arrays.put(array, array.dtype) for array in given_arrays[:half]]
        arrays.send()
        for array, view in zip(given_arrays, views, strict=True):
            assert view.numpy().dtype == array.dtype
            np.testing.assert_array_equal(view.numpy(), array)
            assert not view.numel() or view.data_ptr() % array.itemsize == 0


def test_a_round_is_one_copy(copies: list[int]) -> None:
    arrays = HostArrays(CPU, 256, staged=True)
    for number in range(4):
        arrays.begin()
        views = [arrays.put(np.full(12, n + number)) for n in range(20)]
        assert copies == []
        arrays.send()
        arrays.send()  # nothing is left
        assert [view[0].item() for view in views] == [n + number for n in range(20)]
        # The first round exceeds the initial capacity; from then on there is room.
        assert len(copies) == 1 or number == 0
        copies.clear()


def test_nothing_arrives_before_it_is_sent() -> None:
    arrays = HostArrays(CPU, 256, staged=True)
    fixed = arrays.reserve((3,), np.int64)
    arrays.begin()
    fixed.write(np.array([1, 2, 3]))
    arrays.send()
    arrays.begin()
    fixed.write(np.array([4, 5, 6]))
    assert fixed.view.tolist() == [1, 2, 3]
    arrays.send()
    assert fixed.view.tolist() == [4, 5, 6]


@pytest.mark.parametrize("staged", [False, True])
def test_fixed_arrays_stay_where_they_are(staged: bool, copies: list[int]) -> None:
    arrays = HostArrays(CPU, 128, staged=staged)
    fixed = [arrays.reserve((5,), np.int32), arrays.reserve((2, 2), np.int64)]
    places = [each.view.data_ptr() for each in fixed]
    for number, size in enumerate([1, 100, 3, 3, 400, 2]):
        arrays.begin()
        fixed[0].write(np.arange(5) + number)
        fixed[1].write(np.full((2, 2), number))
        view = arrays.put(np.arange(size))
        arrays.send()
        assert [each.view.data_ptr() for each in fixed] == places
        assert fixed[0].view.tolist() == [number + n for n in range(5)]
        assert fixed[1].view.tolist() == [[number] * 2] * 2
        assert view.tolist() == list(range(size))
    assert len(copies) <= (2 * 6 if staged else 0)


def test_a_large_round_leaves_small_ones_at_one_copy(copies: list[int]) -> None:
    arrays = HostArrays(CPU, 128, staged=True)
    fixed = arrays.reserve((5,), np.int32)
    for size, num_copies in [(2, 1), (100, 2), (2, 1), (100, 2), (3, 1)]:
        arrays.begin()
        fixed.write(np.arange(5))
        view = arrays.put(np.arange(size))
        arrays.send()
        assert view.tolist() == list(range(size))
        assert len(copies) == num_copies
        copies.clear()


def test_a_fixed_array_is_written_in_every_round() -> None:
    arrays = HostArrays(CPU, 128, staged=True)
    fixed = arrays.reserve((2,), np.int64)
    arrays.begin()
    with pytest.raises(ValueError, match=r"has shape \(2,\), got \(3,\)"):
        fixed.write(np.zeros(3))
    with pytest.raises(RuntimeError, match="was not written"):
        arrays.send()


def test_on_the_host_nothing_is_copied(copies: list[int]) -> None:
    arrays = HostArrays(CPU)
    array = np.arange(9)
    view = arrays.put(array)
    arrays.send()
    assert view.data_ptr() == array.ctypes.data
    tensor = torch.arange(4)
    (read,) = read_back([tensor])
    assert read.ctypes.data == tensor.data_ptr()
    assert copies == []


def test_a_plan_goes_along_with_others(copies: list[int]) -> None:
    numbers = [np.arange(3), np.zeros((2, 0)), np.ones((2, 3))]
    among = HostArrays(CPU, staged=True)
    packed = PackedArrays([each.shape for each in numbers], CPU, among)
    among.begin()
    packed.rewrite(numbers)
    views = pack(numbers, CPU, among)
    assert copies == []
    among.send()
    assert len(copies) == 1
    for own in (packed.views, views, pack(numbers, CPU, None)):
        assert all(view.dtype == torch.int32 for view in own)
        assert [view.tolist() for view in own] == [each.tolist() for each in numbers]


@given(ARRAYS, st.booleans())
def test_what_is_read_back_is_what_was_there(own: list, packed: bool) -> None:
    arrays = [numbers(*each) for each in own]
    tensors = [torch.from_numpy(array) for array in arrays]
    if len(own) > 1 and tensors[0].ndim > 1:
        tensors[0] = tensors[0].transpose(0, 1)
        arrays[0] = arrays[0].swapaxes(0, 1)
    for array, read in zip(arrays, read_back(tensors, packed), strict=True):
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)
