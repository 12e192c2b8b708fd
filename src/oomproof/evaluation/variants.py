"""What is compared: the rows of the table, and how people name them. Free of torch.

nf4           a format, as loading quantizes it
nf4+search    the same with block scales that are searched
fit           the mixture that a plan for this device chooses
fit:40MiB     the mixture of least predicted damage whose whole model takes at most so many bytes
./folder      a checkpoint in 4 bits, whose codes are read and not made again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oomproof.errors import InputError
from oomproof.formats import FIT, FORMATS, SEARCHED_FORMATS, Format, get_format
from oomproof.memory.profiles import NATIVE_FORMATS
from oomproof.models.spec import ModelSpec, TensorSpec
from oomproof.units import parse_bytes

SEARCH = "+search"
"""What follows the name of a format whose block scales are searched."""
COMPARED = tuple(name for name, f in FORMATS.items() if f.is_quantized and name in NATIVE_FORMATS)
"""Formats below 16 bits that the native engine holds."""
MAX_VARIANTS = 64
_SHOWN = 60
"""Characters of a name that an error quotes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What one name asks for."""

    name: str
    format: str | None = None
    """A key of FORMATS, or "fit"; None for a folder."""
    search: bool = False
    budget_bytes: int | None = None
    """Of a "fit" that a plan does not bound."""
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFolder:
    """A checkpoint that is quantized already."""

    spec: ModelSpec
    """With the headers of its files."""
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to hold the model's weights."""

    name: str
    """As it was asked for, without what leads to a folder."""
    format: Format
    search: bool = False
    """Whether block scales are searched."""
    stored: StoredFolder | None = None
    """Where its weights are read, where they are not quantized here."""

    @property
    def is_plain(self) -> bool:
        """Whether it is one format, as loading quantizes it without a search."""
        return self.format.by_tensor is None and not self.search and self.stored is None

    def tensors(self, spec: ModelSpec) -> Sequence[TensorSpec]:
        """The model's parameters, as far as they are held in 16 bits marked so."""
        return spec.tensors if self.stored is None else self.stored.spec.tensors


def plain(name: str) -> Variant:
    """A format as loading quantizes it."""
    return Variant(name=name, format=get_format(name))


def read_names(formats: str | Sequence[str]) -> list[Asked]:
    """What the names ask for, each once.

    Args:
        formats: Names with commas between them, or a list of them.

    Raises:
        InputError: One of them is none, or there is none or too many.
    """
    listed = formats.split(",") if isinstance(formats, str) else list(formats)
    names = dict.fromkeys(name.strip() for name in listed if name.strip())
    if not names:
        raise InputError("formats lists none", remedy=f'write "{",".join(COMPARED)}"')
    if len(names) > MAX_VARIANTS:
        raise InputError(f"formats lists {len(names)}, {MAX_VARIANTS} are the most at once")
    return _told_apart([_read_name(name) for name in names])


def _read_name(name: str) -> Asked:
    if "/" in name or "\\" in name or name.startswith(("~", ".")):
        return Asked(name=_of_folder(Path(name)), folder=Path(name))
    base, plus, suffix = name.partition("+")
    if plus:
        return _searched(name, base, suffix)
    base, colon, budget = name.partition(":")
    if colon:
        if base != FIT:
            raise InputError(
                f"format {name[:_SHOWN]!r}: only fit takes a number of bytes",
                remedy='write "fit:40MiB"',
            )
        size_bytes = parse_bytes(budget, what=f"format {name[:_SHOWN]!r}: size")
        return Asked(name=name, format=FIT, search=True, budget_bytes=size_bytes)
    if base == FIT:
        return Asked(name=name, format=FIT, search=True)
    if base not in FORMATS and Path(base[:_SHOWN]).is_dir():
        raise InputError(f"unknown format {base!r}", remedy=f'for the folder write "./{base}"')
    get_format(name[:_SHOWN])
    return Asked(name=name, format=name)


def _searched(name: str, base: str, suffix: str) -> Asked:
    if base not in SEARCHED_FORMATS or f"+{suffix}" != SEARCH:
        raise InputError(
            f"unknown format {name[:_SHOWN]!r}",
            remedy=f"use some of {', '.join(one + SEARCH for one in SEARCHED_FORMATS)}",
        )
    return Asked(name=name, format=base, search=True)


def _of_folder(path: Path) -> str:
    return f"{path.expanduser().name or path}/"


def _told_apart(asked: list[Asked]) -> list[Asked]:
    """Folders of one name keep their whole path."""
    names = [one.name for one in asked]
    return [
        Asked(name=str(one.folder), folder=one.folder)
        if one.folder is not None and names.count(one.name) > 1
        else one
        for one in asked
    ]
