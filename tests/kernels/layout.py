"""Kernel parameters are written down in Python and in CUDA C++: the compiler compares them."""

from __future__ import annotations

import ctypes


def layout_checks(parameters: type[ctypes.Structure]) -> str:
    """C++ that compiles only where a struct of this name lies in memory as Python packs it.

    ctypes follows the host's C compiler, which CUDA's matches on Linux; what can differ are the
    fields, their order and their types, for they are written down twice.
    """
    struct = parameters.__name__
    size, alignment = ctypes.sizeof(parameters), ctypes.alignment(parameters)
    lines = [
        f'static_assert(sizeof({struct}) == {size}, "{struct} has {size} bytes in Python");',
        f'static_assert(alignof({struct}) == {alignment}, "{struct} has another alignment");',
    ]
    # NVRTC has no offsetof; this is the operator that its front end makes of it.
    for name, *_ in parameters._fields_:
        place = getattr(parameters, name)
        lines.append(
            f"static_assert(__INTADDR__(&(({struct}*)0)->{name}) == {place.offset} && "
            f"sizeof((({struct}*)0)->{name}) == {place.size}, "
            f'"{struct}.{name} lies elsewhere in Python");'
        )
    return "\n".join(lines) + "\n"
