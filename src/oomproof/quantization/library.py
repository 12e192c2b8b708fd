"""Declares torch operators: schema, plain-torch meaning, sizes, then faster kernels.

As `torch.library.custom_op`, on torch.library.Library: there the first call of any operator imports
torch's compiler, a second and 150 MB that running a model has no use for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARIES: dict[str, torch.library.Library] = {}


class Operator(Generic[P, R]):
    """An operator; call it as the function that it was declared with.

    Args:
        name: "namespace::name".
        reference: Its meaning in plain torch, for every device without a kernel of its own.
        mutates_args: Names of the arguments that it writes to.
    """

    def __init__(self, name: str, reference: Callable[P, R], mutates_args: Sequence[str]) -> None:
        self._qualified_name = name
        namespace, self._name = name.split("::")
        if namespace not in _LIBRARIES:
            _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
        self._library = _LIBRARIES[namespace]
        schema = torch.library.infer_schema(reference, mutates_args=mutates_args)
        self._library.define(self._name + schema)
        self._library.impl(self._name, reference, "CompositeExplicitAutograd")
        self._call: Any = getattr(getattr(torch.ops, namespace), self._name).default
        self._reference = reference
        self._kernels: dict[str, Callable[..., R]] = {}
        self.__doc__ = reference.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Computes on the device of its arguments."""
        result: R = self._call(*args, **kwargs)
        return result

    def register_kernel(self, device_type: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
        """A decorator: the function serves a type of devices ("cuda")."""

        def register(kernel: Callable[..., R]) -> Callable[..., R]:
            self._library.impl(self._name, kernel, device_type.upper())
            self._kernels[device_type] = kernel
            return kernel

        return register

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: the function makes results of the right sizes, without computing."""
        torch.library.register_fake(self._qualified_name, fake, lib=self._library)
        self._kernels["meta"] = fake
        return fake

    def on(self, device_type: str) -> Callable[P, R]:
        """What serves a type of devices, without torch's dispatcher and its tens of microseconds.

        For code below autograd that has made the tensors' device the current one.
        """
        kernel = self._kernels.get(device_type, self._reference)
        return kernel.function() if isinstance(kernel, on_cuda) else kernel


class on_cuda:  # noqa: N801 - reads as a preposition
    """A kernel for `register_kernel`: the function of a module, on the GPU of its first argument.

    The module is imported at the first call, for it imports Triton; and a kernel of Triton's is
    launched on whichever device is current, not on that of its tensors.
    """

    def __init__(self, module: str, function: str) -> None:
        self._module, self._function = module, function

    def __call__(self, first: torch.Tensor, *others: Any) -> None:
        """Launches it."""
        with torch.cuda.device(first.device):
            self.function()(first, *others)

    def function(self) -> Callable[..., Any]:
        """The function itself."""
        found: Callable[..., Any] = getattr(import_module(self._module), self._function)
        return found


def writes_where_told(*_arguments: object) -> None:
    """The fake kernel of an operator that returns nothing: all sizes are its arguments'."""


def operator(
    name: str, *, mutates_args: Sequence[str]
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """A decorator: the function becomes an operator, and its reference."""

    def declare(reference: Callable[P, R]) -> Operator[P, R]:
        return Operator(name, reference, mutates_args)

    return declare
