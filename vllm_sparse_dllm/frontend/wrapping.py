# SPDX-License-Identifier: Apache-2.0
"""The one way in which functions of vLLM are wrapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, *parameters: str) -> Callable[[Callable[..., Any]], None]:
    """Replace a function of vLLM by the decorated one, which is called with the original first.

    Has no effect if the function was replaced by the same one before, so that plugins may be
    loaded repeatedly.

    Args:
        owner: The class or module that has the function.
        name: Its name.
        parameters: Names of its parameters that the decorated function relies on, in any order.

    Raises:
        RuntimeError: If vLLM's function lacks one of the parameters.
    """
    original = getattr(owner, name)
    missing = set(parameters) - set(inspect.signature(original).parameters)
    if missing:
        raise RuntimeError(
            f"{owner.__name__}.{name} of this vLLM has no parameter {', '.join(sorted(missing))}, "
            "which vllm_sparse_dllm relies on"
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
