# SPDX-License-Identifier: Apache-2.0
"""Functions of vLLM are wrapped once, by wrappers that name the parameters they need."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_sparse_dllm.frontend.wrapping import wrap


def make_owner() -> Any:
    class Owner:
        def double(self, number: int, times: int = 2) -> int:
            """Multiply."""
            return number * times

        async def later(self, number: int) -> int:
            return number

    return Owner


def install(owner: Any) -> None:
    @wrap(owner, "double", "number")
    def one_more(original: Any, self: Any, number: int, *args: Any, **kwargs: Any) -> int:
        return original(self, number, *args, **kwargs) + 1


def test_the_original_is_called() -> None:
    owner = make_owner()
    install(owner)
    assert owner().double(5) == 11
    assert owner().double(5, times=3) == 16
    assert owner.double.__name__ == "double" and owner.double.__doc__ == "Multiply."


def test_the_same_wrap_counts_once() -> None:
    """Even if it lies below another one."""
    owner = make_owner()
    install(owner)
    install(owner)
    assert owner().double(5) == 11

    @wrap(owner, "double", named=("times",))
    def negative(original: Any, *args: Any, **kwargs: Any) -> int:
        return -original(*args, **kwargs)

    install(owner)
    assert owner().double(5) == -11


def test_coroutines() -> None:
    owner = make_owner()

    @wrap(owner, "later")
    async def one_more(original: Any, self: Any, number: int) -> int:
        return await original(self, number) + 1

    assert asyncio.run(owner().later(3)) == 4


@pytest.mark.parametrize(
    ("leading", "named"),
    [(("times",), ()), (("number", "other"), ()), (("number", "times", "a"), ()), ((), ("a",))],
)
def test_other_parameters_are_an_error(leading: tuple[str, ...], named: tuple[str, ...]) -> None:
    owner = make_owner()
    message = r"Owner\.double of this vLLM has the parameters \(number, times\), but .* relies on"
    with pytest.raises(RuntimeError, match=message):
        wrap(owner, "double", *leading, named=named)
    with pytest.raises(AttributeError, match="triple"):
        wrap(owner, "triple")
    assert owner().double(5) == 10
