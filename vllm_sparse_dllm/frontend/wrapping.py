# SPDX-License-Identifier: Apache-2.0
"""The one way in which functions of vLLM are wrapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(
    owner: Any, name: str, *leading: str, named: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], None]:
    """Replace a function of vLLM by the decorated one, which is called with the original first.

    Has no effect if the function was replaced by the same one before, so that plugins may be
    loaded repeatedly.

    Args:
        owner: The class or module that has the function.
        name: Its name.
        leading: Its first parameters without ``self``, if they are passed on by position.
        named: Further parameters that the decorated function relies on.

    Raises:
        RuntimeError: If the parameters of vLLM's function are others.
    """
    original = getattr(owner, name)
    found = [one for one in inspect.signature(original).parameters if one != "self"]
    if found[: len(leading)] != list(leading) or not set(named) <= set(found):
        wanted = ", ".join((*leading, *named))
        raise RuntimeError(
            f"{owner.__name__}.{name} of this vLLM has the parameters ({', '.join(found)}), but "
            f"vllm_sparse_dllm relies on ({wanted})"
        )

    def decorate(replacement: Callable[..., Any]) -> None:
        function = original
        while function is not None:
            if getattr(function, "replaced_by", None) == replacement.__qualname__:
                return
            function = getattr(function, "__wrapped__", None)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        wrapped.replaced_by = replacement.__qualname__  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)

    return decorate
