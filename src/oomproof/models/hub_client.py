"""huggingface_hub with the environment of this moment: ranges, cache, downloads, errors as ours.

models/hub.py says what is read and when; this file says how. huggingface_hub is imported only when
a function here runs.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from oomproof.errors import CheckpointError, InputError, ModelNotFoundError, OomproofError
from oomproof.models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    SINGLE_FILE,
    Shard,
    find_weights,
    parse_index,
)
from oomproof.models.folder import read_bounded, read_shard
from oomproof.models.headers import header_end, parse_header
from oomproof.units import KIB, format_bytes

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Progress = Callable[[int, int], None]
"""Called with (done, total), from any thread but one at a time."""

MAX_WORKERS = 8
"""Connections at once: the hub limits requests, and a header is one or two of them."""
FIRST_READ_BYTES = 64 * KIB
"""What is asked of a shard first; most headers end before it."""
RETRY_PAUSES_S = (0.5, 1.0)
"""Before a header is asked for again, after a connection broke."""

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENDPOINT = re.compile(
    r"https?://(?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d{1,5})?(?:/[\w./~-]*)?", re.ASCII
)
_LENGTH = re.compile(r"\d{1,18}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", re.ASCII)
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A repository's top-level files at one commit."""

    commit: str
    sizes: Mapping[str, int | None]
    """File name → bytes, None where the hub does not say."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File name → digest, of large files, where the hub says."""


class HubUnreachableError(ModelNotFoundError):
    """The hub gave no answer; the cache may have one."""


def location_of(repo: str, commit: str) -> str:
    """How errors name a repository at a commit."""
    return f"{repo}@{commit[:12]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class HubClient:
    """huggingface_hub with the environment of this moment, and its errors as ours."""

    endpoint: str
    cache: Path
    offline: bool

    @classmethod
    def from_environment(cls) -> HubClient:
        """Reads what huggingface_hub reads once, when it is imported."""
        variables = os.environ
        endpoint = (variables.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if not _ENDPOINT.fullmatch(endpoint):
            # Its value is not repeated: it may hold a password.
            raise InputError("HF_ENDPOINT is not an address", remedy='write "https://host"')
        cache_home = variables.get("XDG_CACHE_HOME") or "~/.cache"
        home = variables.get("HF_HOME") or f"{cache_home}/huggingface"
        cache = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE")
        offline = variables.get("HF_HUB_OFFLINE") or variables.get("TRANSFORMERS_OFFLINE") or ""
        return cls(
            endpoint=endpoint,
            cache=Path(os.path.expandvars(cache or f"{home}/hub")).expanduser(),
            offline=offline.upper() in {"1", "ON", "YES", "TRUE"},
        )

    def not_cached(self, repo: str, what: str) -> ModelNotFoundError:
        """The error for what only the network could bring."""
        return ModelNotFoundError(
            f"{repo}: HF_HUB_OFFLINE is set and {what} in the cache at {self.cache}",
            remedy="unset HF_HUB_OFFLINE, or download the model where there is a network",
        )

    def cached_file(self, repo: str, name: str, revision: str) -> Path | None:
        """Path of a file in the cache, where it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repo, name, cache_dir=self.cache, revision=revision)
        return Path(found) if isinstance(found, str) else None

    def complete_snapshot(self, repo: str, revision: str) -> Path | None:
        """The snapshot folder, where config.json and every weight file are in it."""
        config_path = self.cached_file(repo, CONFIG_FILE, revision)
        if config_path is None:
            return None
        folder = config_path.parent
        if (folder / SINGLE_FILE).exists():
            return folder
        index_path = folder / INDEX_FILE
        if not index_path.exists():
            return None
        weight_map = parse_index(
            read_bounded(index_path, bound_bytes=MAX_INDEX_BYTES), location=str(index_path)
        )
        complete = all((folder / file).exists() for file in set(weight_map.values()))
        return folder if complete else None

    def list_files(self, repo: str, revision: str) -> Listing:
        """Resolves a revision to its commit and lists that commit's top-level files."""
        from huggingface_hub import HfApi, constants

        api = HfApi(endpoint=self.endpoint, library_name="oomproof")
        try:
            with self._explained(repo, revision):
                info = api.model_info(
                    repo,
                    revision=revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
            files: Sequence[Any] = info.siblings or ()  # what the server sent, unchecked
            sizes = {str(file.rfilename): file.size for file in files}
            digests = {
                str(file.rfilename): file.lfs.sha256 for file in files if file.lfs is not None
            }
            commit = info.sha or ""
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelNotFoundError(
                f"{self.endpoint} does not answer as a hub does ({error})",
                remedy="check HF_ENDPOINT, and whether a login page stands before the network",
            ) from error
        if not COMMIT.fullmatch(commit):
            raise ModelNotFoundError(f"{self.endpoint} names no commit of {repo}")
        return Listing(
            commit=commit,
            sizes={
                name: size if isinstance(size, int) and size >= 0 else None
                for name, size in sizes.items()
                if "/" not in name
            },
            sha256={
                name: digest
                for name, digest in digests.items()
                if isinstance(digest, str) and _SHA256.fullmatch(digest)
            },
        )

    def fetch_small(
        self, repo: str, name: str, revision: str, listing: Listing, bound_bytes: int
    ) -> Path:
        """Brings a small file into the cache; it is of the listing's commit."""
        from huggingface_hub import hf_hub_download

        size = listing.sizes[name]
        if size is not None and size > bound_bytes:
            raise CheckpointError(
                f"{location_of(repo, listing.commit)}/{name}",
                f"has {size:,} bytes, the bound is {format_bytes(bound_bytes)}",
            )
        fetch = partial(hf_hub_download, repo, name, cache_dir=self.cache, endpoint=self.endpoint)
        with self._explained(repo, revision), _no_progress_bars():
            path = Path(fetch(revision=revision))
            if path.parent.name != listing.commit:  # the branch moved since it was listed
                path = Path(fetch(revision=listing.commit))
        return path

    def read_weight_map(self, repo: str, listing: Listing) -> dict[str, str] | None:
        """The shard index of a repository; None where its weights are a single file or absent."""
        location = location_of(repo, listing.commit)
        if find_weights(listing.sizes, location=location) != "sharded":
            return None
        path = self.fetch_small(repo, INDEX_FILE, listing.commit, listing, MAX_INDEX_BYTES)
        raw = read_bounded(path, bound_bytes=MAX_INDEX_BYTES)
        return parse_index(raw, location=f"{location}/{INDEX_FILE}")

    def read_shards(
        self, repo: str, files: Sequence[str], listing: Listing, progress: Progress | None
    ) -> list[Shard]:
        """Headers of all shards, several at a time; the first error stops the rest."""
        report = progress or (lambda _done, _total: None)
        shards: list[Shard] = []
        with ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="headers") as pool:
            pending = [pool.submit(self.read_shard, repo, file, listing) for file in files]
            try:
                for future in pending:
                    shards.append(future.result())
                    report(len(shards), len(files))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return shards

    def read_shard(self, repo: str, file: str, listing: Listing) -> Shard:
        """One shard by its header, from the cache where it is there, else by HTTP range."""
        cached = self.cached_file(repo, file, listing.commit)
        if cached is not None:
            return read_shard(cached)
        from huggingface_hub import hf_hub_url

        location = f"{location_of(repo, listing.commit)}/{file}"
        url = hf_hub_url(repo, file, revision=listing.commit, endpoint=self.endpoint)
        with self._explained(repo, listing.commit):
            listed_bytes = listing.sizes[file]
            if listed_bytes == 0:  # no range of it could be served
                header_end(b"", file_bytes=0, location=location)
            prefix, served_bytes = _read_range(url, 0, FIRST_READ_BYTES)
            file_bytes = served_bytes if listed_bytes is None else listed_bytes
            if file_bytes is None:
                raise CheckpointError(location, "has a length that the hub does not tell")
            if served_bytes not in {None, file_bytes}:
                raise CheckpointError(
                    location, f"has {file_bytes:,} bytes as listed, {served_bytes:,} as served"
                )
            data_begin = header_end(prefix, file_bytes=file_bytes, location=location)
            if data_begin > FIRST_READ_BYTES:
                prefix += _read_range(url, FIRST_READ_BYTES, data_begin)[0]
        tensors = parse_header(prefix, file=file, file_bytes=file_bytes, location=location)
        return Shard(file=file, size_bytes=file_bytes, tensors=tensors)

    def check_disk(self, repo: str, needed_bytes: int) -> None:
        """Refuses a download that the cache's disk cannot take."""
        existing = next(
            folder for folder in (self.cache, *self.cache.absolute().parents) if folder.exists()
        )
        free_bytes = shutil.disk_usage(existing).free
        if needed_bytes > free_bytes:
            raise CheckpointError(
                str(self.cache),
                f"{repo} needs {format_bytes(needed_bytes)}, "
                f"the disk has {format_bytes(free_bytes)} free",
                remedy="free some, or set HF_HOME to a folder on a larger disk",
            )

    def fetch_snapshot(
        self,
        repo: str,
        commit: str,
        names: Sequence[str],
        *,
        total_bytes: int,
        progress: Progress | None,
    ) -> Path:
        """Downloads the named files and returns the snapshot folder."""
        from huggingface_hub import snapshot_download

        report = progress or (lambda _done, _total: None)
        report(0, total_bytes)
        with self._explained(repo, commit), _no_progress_bars():
            folder = snapshot_download(
                repo,
                revision=commit,
                cache_dir=self.cache,
                endpoint=self.endpoint,
                # Exact names: they hold none of the characters that patterns give a meaning to.
                allow_patterns=list(names),
                max_workers=MAX_WORKERS,
                tqdm_class=_counting_bar(partial(_report_at_most, report, total_bytes)),
            )
        # Where the connection breaks early, huggingface_hub returns what the cache had.
        for name in names:
            if not Path(folder, name).exists():
                raise CheckpointError(f"{location_of(repo, commit)}/{name}", "was not downloaded")
        report(total_bytes, total_bytes)
        return Path(folder)

    def fetch_beside(
        self, repo: str, name: str, commit: str, folder: Path, told: Callable[[int], None]
    ) -> Path:
        """Downloads one file into a folder, not into the cache; goes on where it was broken off.

        Args:
            repo: Repository id.
            name: The file.
            commit: Of the repository.
            folder: Made where it is not there.
            told: Called with bytes written so far.
        """
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {}
        if "tqdm_class" in signature(hf_hub_download).parameters:  # not before huggingface_hub 1
            options["tqdm_class"] = _counting_bar(told)
        with self._explained(repo, commit), _no_progress_bars():
            try:
                path = hf_hub_download(
                    repo, name, revision=commit, local_dir=folder, endpoint=self.endpoint, **options
                )
            except OSError as error:
                if error.errno not in _DISK_ERRORS:
                    raise
                raise CheckpointError(
                    str(folder / name),
                    f"cannot be written ({error.strerror})",
                    remedy="free some space and run the same command again",
                ) from error
        return Path(path)

    @contextmanager
    def _explained(self, repo: str, revision: str) -> Iterator[None]:
        """Turns each way in which huggingface_hub fails into one error with a remedy."""
        from huggingface_hub import errors

        try:
            yield
        except OomproofError:
            raise
        except errors.GatedRepoError as error:
            raise ModelNotFoundError(
                f"{repo} is gated{_said(error)}",
                remedy=f"accept its licence at {self.endpoint}/{repo} and set HF_TOKEN",
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise self._unknown(repo) from error
        except errors.RevisionNotFoundError as error:
            raise ModelNotFoundError(
                f"{repo} has no revision {revision!r}",
                remedy=f"see {self.endpoint}/{repo}/tree/main",
            ) from error
        except errors.LocalEntryNotFoundError as error:  # neither in the cache nor to be had
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                raise self._refused(repo, error.__cause__) from error
            raise self._failed(error) from error
        except errors.HfHubHTTPError as error:
            raise self._refused(repo, error) from error
        except UnicodeEncodeError as error:
            raise ModelNotFoundError(
                "HF_TOKEN has characters that no token has", remedy="copy it again"
            ) from error
        except _transport_errors() as error:
            raise self._failed(error) from error

    def _unknown(self, repo: str) -> ModelNotFoundError:
        return ModelNotFoundError(
            f"no model {repo} at {self.endpoint}, or it is private",
            remedy="check the spelling; a private model needs HF_TOKEN",
        )

    def _refused(self, repo: str, error: HfHubHTTPError) -> OomproofError:
        """The hub answered with an HTTP error that has no class of its own."""
        status, url = error.response.status_code, urlsplit(str(error.response.url))
        if status == 401 and "authorization" in error.response.request.headers:
            return ModelNotFoundError(
                f"{self.endpoint} does not accept the token for {repo}{_said(error)}",
                remedy="renew HF_TOKEN or unset it",
            )
        if status == 401 or (status == 404 and url.path.startswith("/api/")):
            return self._unknown(repo)
        if status == 403:
            return ModelNotFoundError(
                f"the token may not read {repo}{_said(error)}",
                remedy="give it the right to read gated repositories, in its settings",
            )
        if status == 404:
            return CheckpointError(
                f"{repo}/{Path(url.path).name}", f"is listed but not there{_said(error)}"
            )
        if status == 429 or status >= 500:
            return HubUnreachableError(
                f"{self.endpoint} answers HTTP {status}{_said(error)}", remedy="try again later"
            )
        return ModelNotFoundError(f"{self.endpoint} answers HTTP {status}{_said(error)}")

    def _failed(self, error: Exception) -> OomproofError:
        """No answer from the hub, or no room for it in the cache."""
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return CheckpointError(
                str(self.cache),
                f"cannot be written ({error.strerror})",
                remedy="set HF_HOME to a folder that can",
            )
        cause = str(error.__cause__ or error).partition("\n")[0][:200]
        return HubUnreachableError(
            f"{self.endpoint} cannot be reached ({cause or type(error).__name__})",
            remedy="check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses the cache alone",
        )


def _said(error: HfHubHTTPError) -> str:
    """The hub's own words, where it had any."""
    words = (error.server_message or "").strip().partition("\n")[0]
    return f" ({words[:200]})" if words else ""


def _read_range(url: str, begin: int, end: int) -> tuple[bytes, int | None]:
    """Bytes [begin, end) of a file, fewer where it is shorter, and its length if the server tells.

    A server that ignores the range sends everything: reading stops at `end` all the same.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for pause_s in RETRY_PAUSES_S:
        try:
            return _try_read_range(url, begin, end)
        except HfHubHTTPError:
            raise  # an answer, and already retried where that helps
        except _transport_errors():
            time.sleep(pause_s)
    return _try_read_range(url, begin, end)


def _try_read_range(url: str, begin: int, end: int) -> tuple[bytes, int | None]:
    utils = _hub_utils()
    headers: dict[str, str] = utils.build_hf_headers(library_name="oomproof")
    # Compressed on its way, the bytes would not be the file's.
    headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with _open_stream(url, headers) as (response, chunks):
        utils.hf_raise_for_status(response)
        told = response.headers.get("Content-Length", "")
        file_bytes = int(told) if _LENGTH.fullmatch(told) else None
        skip = begin
        if response.status_code == 206:
            told_range = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if told_range is None or int(told_range[1]) != begin:
                raise CheckpointError(url, f"the server did not send the range from {begin:,}")
            file_bytes = None if told_range[2] == "*" else int(told_range[2])
            skip = 0
        body = bytearray()
        for chunk in chunks:
            body += chunk
            if len(body) >= skip + end - begin:
                break
    return bytes(body[skip : skip + end - begin]), file_bytes


@contextmanager
def _open_stream(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A response whose body is still on its way, and the body in chunks."""
    from huggingface_hub import constants

    utils = _hub_utils()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if hasattr(utils, "http_stream_backoff"):
        with utils.http_stream_backoff(
            "GET",
            url,
            headers=headers,
            timeout=timeout,
            max_retries=len(RETRY_PAUSES_S),
            retry_on_exceptions=(),
        ) as response:
            yield response, response.iter_bytes()
    else:  # huggingface_hub before 1.0 speaks through requests
        with utils.http_backoff(
            "GET",
            url,
            headers=headers,
            timeout=timeout,
            max_retries=len(RETRY_PAUSES_S),
            stream=True,
        ) as response:
            yield response, response.iter_content(FIRST_READ_BYTES)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences huggingface_hub's own bars, unless the user's environment decides about them."""
    from huggingface_hub import constants

    utils = _hub_utils()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _report_at_most(report: Progress, total_bytes: int, done_bytes: int) -> None:
    report(min(done_bytes, total_bytes), total_bytes)


def _counting_bar(report: Callable[[int], None]) -> type[Any]:
    """A progress bar class for huggingface_hub that draws nothing and passes on the bytes written.

    snapshot_download makes several bars of the class: files, bytes from the network (which
    deduplication makes fewer), bytes written.
    """
    lock = threading.Lock()
    done_bytes = 0

    class CountingBar(_hub_utils().tqdm):  # type: ignore[misc]  # huggingface_hub's is untyped
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            transfer = str(kwargs.get("name", "")).endswith(".transfer")
            self._counts = kwargs.get("unit") == "B" and not transfer
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done_bytes
            if self._counts:
                with lock:
                    done_bytes += int(n or 0)
                    report(done_bytes)

    return CountingBar


def _hub_utils() -> Any:
    """huggingface_hub.utils, whose documented names it does not export to type checkers."""
    return import_module("huggingface_hub.utils")


def _transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub lets through when there is no answer: its HTTP library's own errors."""
    errors: Any = import_module("huggingface_hub.errors")
    return OSError, errors.HTTPError, errors.XetDownloadError
