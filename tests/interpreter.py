# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter faster."""

from __future__ import annotations

from typing import Any


def patch_language_once() -> None:
    """Keep the interpreter from patching `triton.language` in each call of a helper function.

    The launch of a kernel patches the language and restores it at the end. Each call of a jitted
    function in between patches it again, which takes longer than the function itself, although
    nothing is left to patch after the first call of a function of the same module.
    """
    from triton.runtime.interpreter import InterpretedFunction

    original, patched = InterpretedFunction.__call__, set[str]()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return original(self, *args, **kwargs)

    InterpretedFunction.__call__ = call
