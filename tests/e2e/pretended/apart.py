# SPDX-License-Identifier: Apache-2.0
"""A simulated device with its own memory, for machines without a GPU.

Its tensors report ``cuda:0`` and hold a host tensor that only operators on the device can reach.
An operator that mixes host and device tensors is an error, as with CUDA, and so is a Triton kernel
that is given a host tensor. Copies between host and device are noted, and so are operators that
wait for the device (`waits`).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # Imported now: under `apart` its import would take the device for a real one.
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from vllm_sparse_dllm.kernels import interpreted
from vllm_sparse_dllm.kernels.native import find_compiler

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
"""
#: Operators that read a number from the device, or whose result has a shape that depends on
#: numbers there.
WAITING = {
    aten.item.default,
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
#: Composite operators that run as they are. Others are decomposed, so that copies and reads within
#: them are seen.
WHOLE = {
    aten.linear.default,
    aten.matmul.default,
    aten.scaled_dot_product_attention.default,
}
#: Operators that accept tensors of host and device together.
COPIES = {aten.copy_.default, aten._to_copy.default}
#: Operators on the device that accept a single number on the host, as elementwise ones do.
TAKING_NUMBERS = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
}


class DeviceTensor(torch.Tensor):
    """A tensor on the device.

    Attributes:
        held: The host tensor with its numbers.
    """

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> DeviceTensor:
        assert not isinstance(held, DeviceTensor)
        # A view of a tensor made before inference mode shares that tensor's version counter;
        # tensors made in inference mode have none.
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=CUDA,
            )
        tensor.held = held
        return tensor

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func} outside of `apart`")


def _name(func: Any, tensors: list[torch.Tensor]) -> str:
    return f"{func}({', '.join(f'{t.device.type} {tuple(t.shape)}' for t in tensors)})"


def waits(func: Any, args: Any) -> bool:
    """Return whether an operator waits for the device: `WAITING`, or an index by a mask."""
    if func in WAITING:
        return True
    return func in (aten.index.Tensor, aten.index_put_.default) and any(
        index is not None and index.dtype == torch.bool for index in args[1]
    )


def run(func: Any, args: Any, kwargs: dict[str, Any], noted: list[str]) -> Any:
    """Call an operator as on a machine with the device, and add what is noted to ``noted``.

    Raises:
        RuntimeError: If it mixes tensors of host and device.
    """
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    target = kwargs.get("device")
    made_there = target is not None and torch.device(target).type == "cuda"
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    pinned = bool(kwargs.get("pin_memory"))
    if pinned:
        kwargs = {**kwargs, "pin_memory": False}
    if func in COPIES:
        _note_copy(func, args, kwargs, target, noted)
        on_device = isinstance(args[0], DeviceTensor) if target is None else made_there
    else:
        takes_numbers = torch.Tag.pointwise in func.tags or func in TAKING_NUMBERS
        if there and any(tensor.dim() or not takes_numbers for tensor in here):
            raise RuntimeError(f"tensors of host and device: {_name(func, tensors)}")
        if there and waits(func, args):
            noted.append(_name(func, tensors))
        on_device = made_there or (bool(there) and target is None)
    own = {id(tensor.held): tensor for tensor in there}
    args, kwargs = tree_map(_held, (args, kwargs))
    result = func(*args, **kwargs)
    if not on_device:
        if isinstance(result, torch.Tensor):
            # Views of pinned memory are pinned.
            result.is_pinned_here = pinned or any(  # type: ignore[attr-defined]
                _is_pinned(tensor)
                and tensor.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
                for tensor in here
            )
        return result

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        known = own.get(id(leaf))
        if known is None:
            return DeviceTensor(leaf)
        # An operator may write to an existing tensor, but not change its shape.
        assert known.shape == leaf.shape, _name(func, tensors)
        return known

    return tree_map(wrap, result)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, DeviceTensor) else leaf


def _is_pinned(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "is_pinned_here", False)


def _note_copy(func: Any, args: Any, kwargs: dict[str, Any], target: Any, noted: list[str]) -> None:
    """Note a copy between host and device, and whether the host waits for it."""
    source = args[1] if func is aten.copy_.default else args[0]
    goal = args[0].device if func is aten.copy_.default else torch.device(target or source.device)
    if source.device.type != goal.type:
        unasked = not (kwargs.get("non_blocking") or (args[2:] or (False,))[0])
        waits = goal.type == "cpu" or unasked or not _is_pinned(source)
        kind = f"{source.device.type} to {goal.type}"
        noted.append(f"{'copy' if waits else 'queued copy'} from {kind}, {tuple(source.shape)}")


class Apart(TorchDispatchMode):
    """A mode in which ``cuda`` is the simulated device.

    Attributes:
        noted: Copies between host and device, and what waited for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        composite = torch._C.DispatchKey.CompositeImplicitAutograd
        if func not in WHOLE and func.has_kernel_for_dispatch_key(composite):
            with self:
                return func.decompose(*args, **kwargs)
        return run(func, args, kwargs, self.noted)


class _Generator(torch.Generator):
    """A generator on the host that can also report the device as its own."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device


def why_not_apart() -> str | None:
    """Return why the device cannot be simulated on this machine, None if it can."""
    if torch.version.cuda is not None:
        return "PyTorch has a device of that name"
    return None if find_compiler() else "there is no C++ compiler"


@contextmanager
def apart() -> Iterator[Apart]:
    """Simulate the device; requires that `why_not_apart` returns None."""
    _load_guard()
    properties = SimpleNamespace(multi_processor_count=8, is_integrated=False)
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch.cuda, "current_device", lambda: 0),
            (torch, "Generator", _Generator),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        if interpreted():
            from triton.runtime.interpreter import GridExecutor

            launch = _launched_on_device(GridExecutor.__call__)
            stack.enter_context(patch.object(GridExecutor, "__call__", launch))
        # Makes `torch.tensor` copy its numbers from the host by an operator that the mode sees.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield stack.enter_context(Apart())


@cache
def _load_guard() -> None:
    """Register a device guard that does nothing; PyTorch without CUDA has none for ``cuda``."""
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        (root,) = torch.__path__
        compiler = find_compiler()
        assert compiler is not None
        command = [compiler, "-shared", "-fPIC", "-std=c++20", str(source), "-o", str(library)]
        paths = [f"-I{root}/include", f"-L{root}/lib"]
        subprocess.run([*command, *paths, "-lc10"], check=True)
        torch.ops.load_library(str(library))


def _launched_on_device(launch: Callable[..., None]) -> Callable[..., None]:
    """Make kernels in Triton's interpreter accept tensors on the device, and no others."""

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        for leaf in (*args, *kwargs.values()):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor):
                raise ValueError(f"a kernel was given a tensor of the host, {tuple(leaf.shape)}")
        with _disable_current_modes():
            launch(self, *tree_map(_held, args), **tree_map(_held, kwargs))

    return launched


def move(module: nn.Module) -> None:
    """Move parameters and buffers to the device."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = DeviceTensor(tensor.detach())  # type: ignore[assignment]


class Captured:
    """A capture without a graph: a replay runs the function again (`recorded` records operators).

    Attributes:
        num_replayed: Number of replays.
    """

    def __init__(self) -> None:
        self.num_replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.num_replayed += 1
            run()

        return replay
