"""Where source shards are read from: a folder, the hub's cache, or the hub, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from oomproof.conversion.files import digest_of
from oomproof.errors import CheckpointError
from oomproof.models.checkpoint import CONFIG_FILE, MAX_CONFIG_BYTES, TOKENIZER_FILES
from oomproof.models.folder import list_folder, read_bounded, read_shard
from oomproof.models.hub_client import HubClient, HubUnreachableError, Listing
from oomproof.models.spec import CheckpointSpec, ModelSpec
from oomproof.units import MIB

MAX_SIDE_FILE_BYTES = 64 * MIB
"""Of a tokenizer's file; the largest has about 20."""
_COPIED = (
    "generation_config.json",
    *TOKENIZER_FILES,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Files that belong to the quantized model as they are, where the source has them."""

Fetched = Callable[[int], None]
"""Called with the bytes that were fetched in all, so far."""


class Source(Protocol):
    """The files of the model that is quantized."""

    @property
    def config(self) -> bytes:
        """config.json."""

    @property
    def side_files(self) -> Mapping[str, bytes]:
        """What is copied as it is."""

    @property
    def download_bytes(self) -> int:
        """The most of a shard that is on this disk beside the output, at any time."""

    def fetch(self, file: str) -> Path:
        """The folder with a shard; it stays until `release`."""

    def release(self, file: str) -> None:
        """Nothing more is read of a shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderSource:
    """Files that are here already, and stay."""

    folder: Path
    config: bytes
    side_files: Mapping[str, bytes]
    download_bytes: int = 0

    def fetch(self, file: str) -> Path:  # noqa: ARG002
        """See Source."""
        return self.folder

    def release(self, file: str) -> None:
        """See Source."""


@dataclass(kw_only=True, slots=True)
class HubSource:
    """Shards that come one after the other, and go when they are written."""

    hub: HubClient
    repo: str
    listing: Listing
    checkpoint: CheckpointSpec
    folder: Path
    """Where they come to."""
    config: bytes
    side_files: Mapping[str, bytes]
    download_bytes: int
    fetched: Fetched | None = None
    _fetched_bytes: int = field(default=0, init=False)
    _here: str | None = field(default=None, init=False)
    """The shard that was fetched last, until it is released."""

    def fetch(self, file: str) -> Path:
        """See Source.

        Raises:
            CheckpointError: What came is not what its header was before.
            ModelNotFoundError: The hub does not give it.
        """
        if self._here == file:
            return self.folder
        cached = self.hub.cached_file(self.repo, file, self.listing.commit)
        if cached is not None:
            return cached.parent
        before, size = self._fetched_bytes, dict(self.checkpoint.files)[file]

        def told(done_bytes: int) -> None:
            if self.fetched is not None:
                self.fetched(before + min(done_bytes, size))

        # What a run left that was killed between writing from a shard and letting it go.
        if any(path.name != file for path in self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)
        path = self.hub.fetch_beside(self.repo, file, self.listing.commit, self.folder, told)
        self._refuse_damaged(path, file)
        shard = read_shard(path)
        expected = tuple(one for one in self.checkpoint.tensors if one.file == file)
        if shard.size_bytes != size or shard.tensors != expected:
            path.unlink()
            raise CheckpointError(
                f"{self.repo}/{file}", "is another file than its header was read from"
            )
        self._fetched_bytes += size
        told(size)
        self._here = file
        return self.folder

    def _refuse_damaged(self, path: Path, file: str) -> None:
        """Compares a download with the hub's digest; huggingface_hub compares its length only."""
        expected = self.listing.sha256.get(file)
        found = expected and digest_of(path).sha256
        if found != expected:
            path.unlink()
            raise CheckpointError(
                f"{self.repo}/{file}",
                f"came with sha256 {str(found)[:12]}…, the hub has {str(expected)[:12]}…",
                remedy="run the same command again: what is finished is kept",
            )

    def release(self, file: str) -> None:
        """See Source."""
        if (self.folder / file).exists():
            self._here = None
            shutil.rmtree(self.folder, ignore_errors=True)


def source_of(spec: ModelSpec, folder: Path, fetched: Fetched | None = None) -> Source:
    """The model's files.

    Args:
        spec: The model, with the headers of its checkpoint.
        folder: Where shards may be downloaded to.
        fetched: Told of downloads.

    Raises:
        ModelNotFoundError: The hub does not have it.
        CheckpointError: A file that cannot be read.
    """
    if spec.source.kind == "folder":
        return _from_folder(Path(spec.source.path))
    hub = HubClient.from_environment()
    repo, commit = spec.source.path, spec.source.revision or "main"
    snapshot = hub.complete_snapshot(repo, commit)
    if snapshot is not None:
        # Small files may still be missing there; without an answer it is used as it is.
        if not hub.offline:
            with suppress(HubUnreachableError):
                listing = hub.list_files(repo, commit)
                for name in (set(_COPIED) | {CONFIG_FILE}) & set(listing.sizes):
                    hub.fetch_small(repo, name, listing.commit, listing, MAX_SIDE_FILE_BYTES)
        return _from_folder(snapshot)
    if hub.offline:
        raise hub.not_cached(repo, "not all of its weights are")
    listing = hub.list_files(repo, commit)
    side_files = {
        name: _small(hub, repo, name, listing, MAX_SIDE_FILE_BYTES)
        for name in _COPIED
        if name in listing.sizes
    }
    assert spec.checkpoint is not None
    missing = [
        size
        for file, size in spec.checkpoint.files
        if hub.cached_file(repo, file, listing.commit) is None
    ]
    return HubSource(
        hub=hub,
        repo=repo,
        listing=listing,
        checkpoint=spec.checkpoint,
        folder=folder,
        config=_small(hub, repo, CONFIG_FILE, listing, MAX_CONFIG_BYTES),
        side_files=side_files,
        download_bytes=max(missing, default=0),
        fetched=fetched,
    )


def _small(hub: HubClient, repo: str, name: str, listing: Listing, bound_bytes: int) -> bytes:
    path = hub.fetch_small(repo, name, listing.commit, listing, bound_bytes)
    return read_bounded(path, bound_bytes=bound_bytes)


def _from_folder(folder: Path) -> FolderSource:
    names = list_folder(folder)
    return FolderSource(
        folder=folder,
        config=read_bounded(folder / CONFIG_FILE, bound_bytes=MAX_CONFIG_BYTES),
        side_files={
            name: read_bounded(folder / name, bound_bytes=MAX_SIDE_FILE_BYTES)
            for name in _COPIED
            if name in names and (folder / name).is_file()
        },
    )
