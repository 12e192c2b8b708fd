"""Training data from a dataset repository of the hub: one file of JSON lines or of text."""

from __future__ import annotations

import os
import re
from pathlib import Path

from oomproof.errors import InputError
from oomproof.models.hub import is_hub_id
from oomproof.models.hub_client import HubClient
from oomproof.tuning.records import JSON_SUFFIXES, TEXT_SUFFIXES

_TRAIN = re.compile(r"(?:^|[/_.-])train(?:ing)?(?:[/_.-]|$)", re.IGNORECASE)
_MAX_LISTED = 5


def find_data(data: str | Path) -> Path:
    """The file that is meant: a path, or "org/name" or "org/name:file" of the hub.

    Raises:
        InputError: There is none.
    """
    path = Path(data).expanduser()
    text = str(data)
    try:
        if path.exists():
            return path
    except OSError as error:
        raise InputError(f"data {text[:200]!r} cannot be looked at ({error.strerror})") from None
    repo, _, file = text.partition(":")
    if "/" in repo and is_hub_id(repo) and not repo.endswith((*JSON_SUFFIXES, *TEXT_SUFFIXES)):
        return _from_hub(repo, file)
    raise InputError(
        f"data {text[:200]!r} is no file here",
        remedy='give a .jsonl or .txt file, or a dataset of the hub: "org/name"',
    )


def _from_hub(repo: str, file: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    hub = HubClient.from_environment()
    if hub.offline and not file:
        raise InputError(
            f"HF_HUB_OFFLINE is set, and the files of {repo} cannot be listed",
            remedy=f"name one: --data {repo}:train.jsonl",
        )
    try:
        chosen, commit = file, "main"
        if not hub.offline:
            info = HfApi(endpoint=hub.endpoint).dataset_info(repo)
            names = [one.rfilename for one in info.siblings or ()]
            chosen, commit = _choose(repo, names, file), info.sha or "main"
        return Path(
            hf_hub_download(
                repo,
                chosen,
                repo_type="dataset",
                revision=commit,
                cache_dir=hub.cache,
                endpoint=hub.endpoint,
                local_files_only=hub.offline,
            )
        )
    except InputError:
        raise
    except Exception as error:
        # huggingface_hub and what it stands on raise a dozen types for what the network does.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"dataset {repo} cannot be had from {hub.endpoint} ({lines[0][:200]})",
            remedy="check the spelling and the network; a private one needs HF_TOKEN",
        ) from error


def _choose(repo: str, names: list[str], asked: str) -> str:
    """The file that is asked for, or the one that is plainly the training data."""
    if asked:
        if asked not in names:
            raise InputError(f"dataset {repo} has no file {asked[:80]!r}", remedy=_listed(names))
        return asked
    readable = [
        name
        for name in sorted(names)
        if name.lower().endswith((".jsonl", ".ndjson", ".txt"))
        and not os.path.basename(name).startswith(".")  # noqa: PTH119 - names of the hub, no paths
    ]
    if not readable:
        parquet = any(name.endswith(".parquet") for name in names)
        raise InputError(
            f"dataset {repo} has no .jsonl or .txt file"
            + (", only Parquet, which is not read" if parquet else ""),
            remedy="write it as JSON lines: datasets.load_dataset(id, split='train')"
            ".to_json('data.jsonl')",
        )
    train = [name for name in readable if _TRAIN.search(name)]
    for found in (readable, train):
        if len(found) == 1:
            return found[0]
    raise InputError(
        f"dataset {repo} has {len(readable)} files that could be meant",
        remedy=f"name one, as in --data {repo}:{(train or readable)[0]}; {_listed(readable)}",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MAX_LISTED])
    return f"it has {shown or 'no files'}" + (" …" if len(names) > _MAX_LISTED else "")
