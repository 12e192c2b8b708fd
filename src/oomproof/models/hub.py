"""A model on the Hugging Face hub: planned from a few kilobytes, downloaded only on request.

`read_hub` asks for the repository's listing, downloads config.json and the shard index into the
hub's own cache, and takes of each safetensors file only its header, by HTTP range. Files that the
cache already has are read there. HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
mean what they mean to huggingface_hub, which is imported only when a function here runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from oomproof.errors import ModelNotFoundError
from oomproof.models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    SINGLE_FILE,
    TOKENIZER_FILES,
    assemble,
    find_weights,
    has_tokenizer,
    missing_config,
    shard_files,
)
from oomproof.models.folder import list_folder, read_bounded, read_folder
from oomproof.models.hub_client import (
    COMMIT,
    HubClient,
    HubUnreachableError,
    Listing,
    Progress,
    location_of,
)
from oomproof.models.spec import CheckpointSpec

_DEFAULT_REVISION = "main"
_REPO_ID = re.compile(r"(?:\w(?:[\w.-]*\w)?/)?\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_REVISION = re.compile(r"\w[\w./+@=-]{0,254}", re.ASCII)
_PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubContents:
    """What a hub repository holds at one commit, before a weight is downloaded."""

    repo: str
    commit: str
    config: bytes
    """config.json as it lies there; models/config.py reads it."""
    config_location: str
    """Where config.json lies, for errors: "org/name@commit/config.json"."""
    checkpoint: CheckpointSpec | None
    """None where the repository has no weights, or the hub was not asked and the cache lacks some:
    it can be planned from its config, not loaded."""
    has_tokenizer: bool
    download_bytes: int
    """What `download` brings into the cache in all, as far as the listing tells sizes."""
    cached_bytes: int
    """The part of download_bytes that the cache already has."""
    folder: Path | None
    """Snapshot folder in the cache, where every weight is there."""
    hub_was_asked: bool
    """False: HF_HUB_OFFLINE is set or the hub cannot be reached; this is what the cache knew."""


def is_hub_id(text: str) -> bool:
    """Whether a text could name a hub repository ("org/name", or "name" for the oldest ones)."""
    return (
        _REPO_ID.fullmatch(text) is not None
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def read_hub(
    repo: str, *, revision: str | None = None, progress: Progress | None = None
) -> HubContents:
    """Reads config.json and every shard's header of a hub repository.

    Args:
        repo: Repository id, "org/name".
        revision: Branch, tag or commit; the default branch where it is not given.
        progress: Called with (headers read, shards).

    Raises:
        ModelNotFoundError: There is no such repository or revision, it is gated or private, or the
            hub cannot be reached and the cache has nothing.
        CheckpointError: The repository's files are damaged, unsafe, or disagree.
    """
    _check_names(repo, revision)
    hub = HubClient.from_environment()
    wanted = revision or _DEFAULT_REVISION
    if hub.offline:
        return _read_cache(hub, repo, wanted)
    if COMMIT.fullmatch(wanted) and (folder := hub.complete_snapshot(repo, wanted)):
        return _read_snapshot(repo, folder, hub_was_asked=False)
    try:
        listing = hub.list_files(repo, wanted)
    except HubUnreachableError:
        if hub.complete_snapshot(repo, wanted) is None:
            raise
        return _read_cache(hub, repo, wanted)
    return _read_listing(hub, repo, wanted, listing, progress)


def download(
    repo: str,
    revision: str | None = None,
    *,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Brings a model into the hub's cache: its safetensors, config, tokenizer and chat template.

    Other weights (pickles, a second copy in another layout) stay where they are, and so does code
    unless it is trusted.

    Args:
        repo: Repository id, "org/name".
        revision: Branch, tag or commit; the default branch where it is not given.
        progress: Called with (bytes received, bytes to receive).
        trust_remote_code: Bring the repository's *.py files too.

    Returns:
        The snapshot folder.

    Raises:
        ModelNotFoundError: As for `read_hub`.
        CheckpointError: The disk is too small, or the download failed.
    """
    _check_names(repo, revision)
    hub = HubClient.from_environment()
    wanted = revision or _DEFAULT_REVISION
    if hub.offline:
        if folder := hub.complete_snapshot(repo, wanted):
            return folder
        raise hub.not_cached(repo, "not all of its weights are")
    try:
        listing = hub.list_files(repo, wanted)
    except HubUnreachableError:
        if folder := hub.complete_snapshot(repo, wanted):
            return folder
        raise
    location = location_of(repo, listing.commit)
    if CONFIG_FILE not in listing.sizes:
        raise missing_config(listing.sizes, location=location)
    names = _files_to_download(
        listing.sizes,
        hub.read_weight_map(repo, listing),
        trust_remote_code=trust_remote_code,
        location=location,
    )
    missing_bytes = sum(
        listing.sizes[name] or 0
        for name in names
        if hub.cached_file(repo, name, listing.commit) is None
    )
    hub.check_disk(repo, missing_bytes)
    # Asked for by its branch, so that the cache learns the branch's commit for offline use.
    hub.fetch_small(repo, CONFIG_FILE, wanted, listing, MAX_CONFIG_BYTES)
    return hub.fetch_snapshot(
        repo, listing.commit, names, total_bytes=missing_bytes, progress=progress
    )


def _check_names(repo: str, revision: str | None) -> None:
    if not is_hub_id(repo):
        raise ModelNotFoundError(
            f"{repo!r} is not the name of a hub model", remedy='write "org/name"'
        )
    # A revision becomes a path in the cache.
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelNotFoundError(
            f"{revision!r} is not a revision of {repo}", remedy="give a branch, a tag or a commit"
        )


def _files_to_download(
    names: Collection[str],
    weight_map: Mapping[str, str] | None,
    *,
    trust_remote_code: bool,
    location: str,
) -> list[str]:
    """Names of the files that make up the model, of those there are."""
    chosen = {CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES}
    if find_weights(names, location=location) == "single":
        chosen.add(SINGLE_FILE)
    elif weight_map is not None:
        chosen |= {INDEX_FILE, *shard_files(weight_map, names, location=location)}
    if trust_remote_code:
        chosen |= {name for name in names if name.endswith(".py") and _PLAIN_NAME.fullmatch(name)}
    return sorted(chosen & set(names))


def _read_cache(hub: HubClient, repo: str, revision: str) -> HubContents:
    """What the cache has of a repository, the hub not being asked."""
    folder = hub.complete_snapshot(repo, revision)
    if folder is not None:
        return _read_snapshot(repo, folder, hub_was_asked=False)
    config_path = hub.cached_file(repo, CONFIG_FILE, revision)
    if config_path is None:
        raise hub.not_cached(repo, "it is not")
    folder = config_path.parent
    names = list_folder(folder)
    return HubContents(
        repo=repo,
        commit=folder.name,
        config=read_bounded(config_path, bound_bytes=MAX_CONFIG_BYTES),
        config_location=f"{location_of(repo, folder.name)}/{CONFIG_FILE}",
        checkpoint=None,
        has_tokenizer=has_tokenizer(names),
        download_bytes=0,
        cached_bytes=0,
        folder=None,
        hub_was_asked=False,
    )


def _read_snapshot(
    repo: str, folder: Path, *, hub_was_asked: bool, sizes: Mapping[str, int | None] | None = None
) -> HubContents:
    """A repository whose weights are all in the cache.

    Args:
        repo: Repository id.
        folder: Its snapshot folder.
        hub_was_asked: Whether the commit is the hub's answer.
        sizes: The hub's listing, where it was asked.
    """
    contents = read_folder(folder)
    here = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    tensors = contents.checkpoint.tensors if contents.checkpoint else ()
    weight_map = {tensor.name: tensor.file for tensor in tensors}
    names = _files_to_download(
        sizes or here, weight_map, trust_remote_code=False, location=str(folder)
    )
    return HubContents(
        repo=repo,
        commit=folder.name,
        config=contents.config,
        config_location=contents.config_file,
        checkpoint=contents.checkpoint,
        has_tokenizer=has_tokenizer(sizes or here),
        download_bytes=sum((sizes or here)[name] or 0 for name in names),
        cached_bytes=sum(here.get(name, 0) for name in names),
        folder=folder,
        hub_was_asked=hub_was_asked,
    )


def _read_listing(
    hub: HubClient, repo: str, revision: str, listing: Listing, progress: Progress | None
) -> HubContents:
    """A repository by the hub's listing: cached files from the cache, the rest by range."""
    commit, sizes = listing.commit, listing.sizes
    location = location_of(repo, commit)
    if CONFIG_FILE not in sizes:
        raise missing_config(sizes, location=location)
    if folder := hub.complete_snapshot(repo, commit):
        return _read_snapshot(repo, folder, hub_was_asked=True, sizes=sizes)
    weight_map = hub.read_weight_map(repo, listing)
    # By its branch, as in `download`.
    config_path = hub.fetch_small(repo, CONFIG_FILE, revision, listing, MAX_CONFIG_BYTES)
    checkpoint = None
    if (layout := find_weights(sizes, location=location)) is not None:
        files = (
            (SINGLE_FILE,)
            if layout == "single" or weight_map is None
            else shard_files(weight_map, sizes, location=location)
        )
        shards = hub.read_shards(repo, files, listing, progress)
        checkpoint = assemble(shards, weight_map=weight_map, location=location)
    names = _files_to_download(sizes, weight_map, trust_remote_code=False, location=location)
    return HubContents(
        repo=repo,
        commit=commit,
        config=read_bounded(config_path, bound_bytes=MAX_CONFIG_BYTES),
        config_location=f"{location}/{CONFIG_FILE}",
        checkpoint=checkpoint,
        has_tokenizer=has_tokenizer(sizes),
        download_bytes=sum(sizes[name] or 0 for name in names),
        cached_bytes=sum(
            sizes[name] or 0 for name in names if hub.cached_file(repo, name, commit) is not None
        ),
        folder=None,
        hub_was_asked=True,
    )
