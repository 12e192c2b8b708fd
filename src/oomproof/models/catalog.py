"""Well-known models by name, so that planning them needs no network.

catalog.json holds for each model the fields of its published config.json that decide sizes, and
is read by the same strict reader as any other config.json. A look-up parses the file and builds
one entry. To add a model, add an entry to catalog.json: its config, its parameter count, what its
publisher says the count is, and the hub repositories it stands for, each with the fields in which
it differs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from oomproof.models.architectures import build_spec
from oomproof.models.spec import ModelSource, ModelSpec

_MAX_SUGGESTIONS = 3
_MAX_NAME = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class CatalogEntry:
    """A well-known model."""

    name: str
    """Our short name: "llama-3.1-8b"."""
    repository: str
    """The hub repository that was asked for; for a short name the first one."""
    repositories: tuple[str, ...]
    """Every hub repository that the entry stands for."""
    parameters: int
    """Exact number of parameters, tied weights once."""
    published: str
    """The number of parameters as the model's card or hub page prints it: "8.03B"."""
    source: str
    """Where the facts come from."""
    config: Mapping[str, object]
    """The repository's config.json, as far as sizes depend on it."""

    def spec(self, *, id: str | None = None) -> ModelSpec:  # noqa: A002 - it becomes ModelSpec.id
        """The model, described.

        Args:
            id: The name it was asked for by; the short name if None.
        """
        return build_spec(
            self.config,
            id=id or self.name,
            source=ModelSource(kind="catalog", path=self.repository),
            file=f"catalog.json, {self.name}",
        )


def find(name: str) -> CatalogEntry | None:
    """The entry for a short name, a hub repository, or a repository's name without its owner.

    Case does not matter.
    """
    found = _index().get(name.casefold())
    if found is None:
        return None
    short_name, repository = found
    raw = _catalog()[short_name]
    return CatalogEntry(
        name=short_name,
        repository=repository,
        repositories=tuple(raw["repositories"]),
        parameters=raw["parameters"],
        published=raw["published"],
        source=raw["source"],
        config=raw["config"] | raw["repositories"][repository],
    )


def names() -> list[str]:
    """Every short name, family by family."""
    return list(_catalog())


def suggest(name: str, *others: str) -> list[str]:
    """Short names, repositories and others that resemble an unknown name, the closest first."""
    spellings = {other.casefold(): other for other in others}
    for short_name, raw in _catalog().items():
        for spelling in (short_name, *raw["repositories"]):
            spellings[spelling.casefold()] = spelling
    matches = difflib.get_close_matches(name[:_MAX_NAME].casefold(), spellings, _MAX_SUGGESTIONS)
    return [spellings[match] for match in matches]


@cache
def _catalog() -> dict[str, dict[str, Any]]:
    text = resources.files("oomproof.models").joinpath("catalog.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def _index() -> dict[str, tuple[str, str]]:
    """Every spelling in lower case → (short name, repository); short names go first."""
    index: dict[str, tuple[str, str]] = {}
    for short_name, raw in _catalog().items():
        index[short_name.casefold()] = (short_name, next(iter(raw["repositories"])))
    for short_name, raw in _catalog().items():
        for repository in raw["repositories"]:
            spelling = repository.casefold()
            index.setdefault(spelling, (short_name, repository))
            index.setdefault(spelling.split("/")[-1], (short_name, repository))
    return index
