from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oomproof.errors import CheckpointError, InputError, ModelNotFoundError
from oomproof.models import hub_client
from oomproof.models.hub import download, is_hub_id, read_hub
from oomproof.models.hub_client import FIRST_READ_BYTES
from tests.models.fake_hub import COMMIT, FakeHub, FakeRepo, fake_hub
from tests.models.safetensors_files import Shapes, safetensors_bytes, sharded_files, single_files

REPO = "org/name"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one sharded model, an empty cache, and no waiting."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_client, "RETRY_PAUSES_S", (0.0,))
    with fake_hub() as server:
        server.repos[REPO] = FakeRepo(files=sharded_files())
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def cache_folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub" / "models--org--name" / "snapshots" / COMMIT


def test_shards_are_read_by_range_and_their_weights_stay_on_the_hub(hub: FakeHub) -> None:
    rows = 1024 * 1024  # × 8 × 2 bytes = 16 MiB
    shard = safetensors_bytes({"model.embed_tokens.weight": (rows, 8)})
    hub.repos[REPO].files[FIRST] = shard
    reported: list[tuple[int, int]] = []
    contents = read_hub(REPO, progress=lambda done, total: reported.append((done, total)))
    assert contents.checkpoint is not None
    assert contents.checkpoint.files == (
        (FIRST, len(shard)),
        (SECOND, len(hub.repos[REPO].files[SECOND])),
    )
    embedding = contents.checkpoint.tensors[0]
    assert embedding.shape == (rows, 8)
    assert embedding.offset_bytes + embedding.size_bytes == len(shard)
    assert hub.sent_bytes(FIRST) < len(shard) / 10
    # A busy machine may lose a connection, and the range is asked for again.
    assert {one.asked_range for one in hub.requests if one.path.endswith(FIRST)} == {
        f"bytes=0-{FIRST_READ_BYTES - 1}"
    }
    assert reported[-1] == (2, 2)
    assert contents.download_bytes == sum(map(len, hub.repos[REPO].files.values()))
    assert contents.folder is None
    assert contents.hub_was_asked


def test_what_a_plan_needs_is_told(hub: FakeHub) -> None:
    contents = read_hub(REPO)
    assert (contents.repo, contents.commit) == (REPO, COMMIT)
    assert json.loads(contents.config)["model_type"] == "llama"
    assert contents.config_location == f"{REPO}@{COMMIT[:12]}/config.json"
    assert contents.has_tokenizer
    small = len(hub.repos[REPO].files["config.json"]) + len(hub.repos[REPO].files[INDEX])
    assert contents.cached_bytes == small


def test_a_single_file_needs_no_index(hub: FakeHub) -> None:
    hub.repos[REPO].files = single_files()
    checkpoint = read_hub(REPO).checkpoint
    assert checkpoint is not None
    assert [file for file, _ in checkpoint.files] == ["model.safetensors"]


def test_a_header_longer_than_the_first_read_is_read_to_its_end(hub: FakeHub) -> None:
    shapes: Shapes = {f"model.layers.{n}.weight": (1,) for n in range(2000)}
    hub.repos[REPO].files = single_files() | {"model.safetensors": safetensors_bytes(shapes)}
    checkpoint = read_hub(REPO).checkpoint
    assert checkpoint is not None
    assert len(checkpoint.tensors) == 2000
    assert hub.sent_bytes("model.safetensors") > FIRST_READ_BYTES


@pytest.mark.parametrize("long_header", [False, True])
def test_a_server_that_ignores_ranges_is_not_read_to_the_end(
    hub: FakeHub, long_header: bool
) -> None:
    shapes: Shapes = {f"model.layers.{n}.weight": (1,) for n in range(2000 if long_header else 1)}
    weights = safetensors_bytes({**shapes, "lm_head.weight": (32 * 1024 * 1024,)})
    hub.repos[REPO] = FakeRepo(
        files=single_files() | {"model.safetensors": weights}, ignores_range=True
    )
    checkpoint = read_hub(REPO).checkpoint
    assert checkpoint is not None
    assert len(checkpoint.tensors) == len(shapes) + 1
    assert hub.sent_bytes("model.safetensors") < len(weights) / 4


def test_a_broken_connection_is_tried_again(hub: FakeHub) -> None:
    hub.repos[REPO].breaks = 1
    assert read_hub(REPO).checkpoint is not None
    hub.repos[REPO].breaks = 9
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        read_hub(REPO)


def test_sizes_the_listing_leaves_out_are_learnt_from_the_range(hub: FakeHub) -> None:
    hub.repos[REPO].tells_sizes = False
    checkpoint = read_hub(REPO).checkpoint
    assert checkpoint is not None
    assert checkpoint.total_bytes == sum(
        len(hub.repos[REPO].files[name]) for name in (FIRST, SECOND)
    )


def test_the_token_is_sent_to_the_endpoint_and_said_nowhere(hub: FakeHub) -> None:
    read_hub(REPO)
    assert {one.token for one in hub.requests} == {"Bearer hf_secret"}
    hub.repos[REPO].error = (401, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(ModelNotFoundError) as caught:
        read_hub(REPO, revision=COMMIT)
    assert "hf_secret" not in str(caught.value)


def test_the_token_does_not_follow_a_redirect_to_another_host(hub: FakeHub) -> None:
    with fake_hub() as storage:
        storage.repos[REPO] = FakeRepo(files=sharded_files())
        hub.repos[REPO].weights_at = storage.endpoint
        assert read_hub(REPO).checkpoint is not None
        assert {one.token for one in storage.requests} == {None}
        assert storage.sent_bytes(FIRST) > 0


def test_a_revision_is_resolved_to_its_commit(hub: FakeHub) -> None:
    hub.repos[REPO].revisions = ("main", "refs/pr/1", "v1.0")
    assert read_hub(REPO, revision="v1.0").commit == COMMIT
    assert read_hub(REPO, revision="refs/pr/1").commit == COMMIT
    assert read_hub(REPO, revision=COMMIT).commit == COMMIT
    with pytest.raises(ModelNotFoundError, match="no revision 'v2'"):
        read_hub(REPO, revision="v2")


FAILURES: dict[str, tuple[dict[str, Any], str, str]] = {
    "gated": ({"error": (403, {"X-Error-Code": "GatedRepo"})}, "is gated", "set HF_TOKEN"),
    "gated, no token": ({"error": (401, {"X-Error-Code": "GatedRepo"})}, "is gated", "licence at"),
    "listing gated": ({"api_error": (403, {"X-Error-Code": "GatedRepo"})}, "is gated", "licence"),
    "private": (
        {"api_error": (404, {"X-Error-Code": "RepoNotFound"})},
        "or it is private",
        "spell",
    ),
    "token not accepted": (
        {"api_error": (401, {"X-Error-Message": "Invalid credentials in Authorization header"})},
        "does not accept the token for org/name (Invalid credentials",
        "renew HF_TOKEN",
    ),
    "token may not": ({"api_error": (403, {})}, "may not read org/name", "give it the right"),
    "rate limit": ({"api_error": (429, {})}, "HTTP 429", "later"),
    "hub down": ({"api_error": (503, {})}, "HTTP 503", "later"),
    "teapot": ({"api_error": (418, {})}, "HTTP 418", ""),
    "login page": ({"api_body": b"<html>Log in</html>"}, "does not answer as a hub does", "login"),
    "other JSON": ({"api_body": b"[1, 2]"}, "does not answer as a hub does", "HF_ENDPOINT"),
    "no commit": ({"api_body": b'{"id": "org/name", "siblings": []}'}, "names no commit", ""),
    "odd siblings": (
        {"api_body": b'{"id": "org/name", "sha": "x", "siblings": [7]}'},
        "does not answer as a hub does",
        "",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_refusal_is_one_error_with_a_way_out(case: str, hub: FakeHub) -> None:
    how, problem, remedy = FAILURES[case]
    hub.repos[REPO] = FakeRepo(files=sharded_files(), **how)
    with pytest.raises(ModelNotFoundError, match=re.escape(problem)) as caught:
        read_hub(REPO)
    assert remedy in (caught.value.remedy or "")
    assert "\n" not in str(caught.value)


def test_a_missing_repository_is_told_with_the_endpoint(hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match=f"no model org/other at {hub.endpoint}"):
        read_hub("org/other")


def test_no_network_is_told_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ModelNotFoundError, match="cannot be reached") as caught:
            read_hub(REPO)
    assert "HF_HUB_OFFLINE=1" in str(caught.value)


DAMAGED: dict[str, tuple[dict[str, bytes | None], str, str]] = {
    "no config": ({"config.json": None}, "config.json", "is missing"),
    "no weights it reads": (
        {INDEX: None, FIRST: None, SECOND: None, "pytorch_model.bin": b"\x80"},
        "pytorch_model.bin",
        "pickle",
    ),
    "index leaves the folder": (
        {INDEX: b'{"weight_map":{"a":"../../x.safetensors"}}'},
        INDEX,
        "leaves the folder",
    ),
    "index not JSON": ({INDEX: b"{"}, INDEX, "not valid JSON"),
    "shard missing": ({SECOND: None}, SECOND, "is missing"),
    "shard empty": ({FIRST: b""}, FIRST, "truncated"),
    "shard cut in its header": ({FIRST: sharded_files()[FIRST][:40]}, FIRST, "truncated"),
    "shard cut in its data": ({FIRST: sharded_files()[FIRST][:-1]}, FIRST, "truncated"),
    "shard with a huge header": (
        {FIRST: (2**40).to_bytes(8, "little") + b"{}"},
        FIRST,
        "announces a header",
    ),
    "shards alike": ({SECOND: sharded_files()[FIRST]}, SECOND, "is in"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_repository_is_one_error_that_names_the_file(case: str, hub: FakeHub) -> None:
    changes, file, problem = DAMAGED[case]
    for name, content in changes.items():
        if content is None:
            del hub.repos[REPO].files[name]
        else:
            hub.repos[REPO].files[name] = content
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_hub(REPO)
    assert caught.value.file == f"{REPO}@{COMMIT[:12]}/{file}"


def test_a_size_other_than_the_listed_one_is_refused(hub: FakeHub) -> None:
    hub.repos[REPO].listed_sizes[FIRST] = 1000
    with pytest.raises(CheckpointError, match="1,000 bytes as listed"):
        read_hub(REPO)


def test_a_config_of_absurd_size_is_not_downloaded(hub: FakeHub) -> None:
    hub.repos[REPO].listed_sizes["config.json"] = 10**9
    with pytest.raises(CheckpointError, match=r"config\.json: has 1,000,000,000 bytes"):
        read_hub(REPO)
    assert hub.sent_bytes("config.json") == 0


def test_a_repository_without_weights_can_be_planned(hub: FakeHub) -> None:
    hub.repos[REPO].files = {"config.json": sharded_files()["config.json"]}
    contents = read_hub(REPO)
    assert contents.checkpoint is None
    assert not contents.has_tokenizer


GOOD_IDS = [
    "org/name",
    "gpt2",
    "meta-llama/Llama-3.1-8B-Instruct",
    "a/b",
    "Qwen/Qwen2.5_0.5B",
    "_/_",
]
BAD_IDS = [
    "",
    "a/b/c",
    "../x",
    "a/..",
    "a/../b",
    "/a",
    "a/",
    "-a/b",
    "a/b.",
    "a--b/c",
    "a/b.git",
    "a b",
    "a/b\n",
    "a/" + "b" * 97,
    "https://huggingface.co/a/b",
    "ünï/code",
    "a\\b",
]


@pytest.mark.parametrize("text", [*GOOD_IDS, *BAD_IDS])
def test_hub_ids_are_told_as_huggingface_hub_tells_them(text: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    assert is_hub_id(text) == (text in GOOD_IDS)
    if text in GOOD_IDS:
        validate_repo_id(text)
    elif text != "ünï/code":  # whose letters huggingface_hub lets pass
        with pytest.raises(HFValidationError):
            validate_repo_id(text)


@pytest.mark.parametrize("text", BAD_IDS)
def test_a_malformed_id_never_reaches_the_network(text: str, hub: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match="not the name of a hub model"):
        read_hub(text)
    assert not hub.requests


@pytest.mark.parametrize("revision", ["", "../../etc", "a b", "-x", "a\n", "x" * 300])
def test_a_malformed_revision_never_reaches_the_network(revision: str, hub: FakeHub) -> None:
    for act in (read_hub, download):
        with pytest.raises(ModelNotFoundError, match="not a revision"):
            act(REPO, revision=revision)
    assert not hub.requests


@pytest.mark.parametrize(
    "endpoint",
    ["huggingface.co", "ftp://host", "https://", "https://a b", "http://[", "http://a@b"],
)
def test_a_malformed_endpoint_is_told(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(InputError, match="HF_ENDPOINT is not an address"):
        read_hub(REPO)


def test_a_download_brings_the_model_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos[REPO].files |= {
        "generation_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "modeling_custom.py": b"raise SystemExit",
        "pytorch_model.bin": b"\x80",
        "consolidated.safetensors": b"another copy",
        "README.md": b"# name",
    }
    reported: list[tuple[int, int]] = []
    folder = download(REPO, COMMIT, progress=lambda done, total: reported.append((done, total)))
    assert folder == cache_folder(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        *sharded_files(),
        "generation_config.json",
        "chat_template.jinja",
    }
    for name in (FIRST, SECOND):
        assert (folder / name).read_bytes() == hub.repos[REPO].files[name]
    total = reported[-1][1]
    assert reported[0] == (0, total)
    assert reported[-1] == (total, total)
    assert total == sum(
        len(hub.repos[REPO].files[path.name])
        for path in folder.iterdir()
        if path.name not in {"config.json", INDEX}
    ) + len(hub.repos[REPO].files["config.json"])
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert any(0 < done < total for done, _ in reported)


def test_code_is_brought_only_where_it_is_trusted(hub: FakeHub) -> None:
    hub.repos[REPO].files["modeling_custom.py"] = b"raise SystemExit"
    assert not (download(REPO) / "modeling_custom.py").exists()
    assert (download(REPO, trust_remote_code=True) / "modeling_custom.py").exists()


def test_a_second_download_transfers_no_file(hub: FakeHub) -> None:
    download(REPO)
    before = hub.sent_bytes(".safetensors")
    reported: list[tuple[int, int]] = []
    download(REPO, progress=lambda done, total: reported.append((done, total)))
    assert hub.sent_bytes(".safetensors") == before
    assert set(reported) == {(0, 0)}


def test_a_disk_that_is_too_small_is_refused_before_the_download(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO].listed_sizes[FIRST] = 10 * 2**30
    usage = shutil.disk_usage("/")._replace(free=3 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs 10\.0 GiB, the disk has 3\.00 GiB free"):
        download(REPO)
    assert hub.sent_bytes(".safetensors") == 0


def test_a_cache_that_cannot_be_written_is_told(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        download(REPO)


def test_a_model_in_the_cache_is_read_there(hub: FakeHub, tmp_path: Path) -> None:
    download(REPO)
    hub.requests.clear()
    pinned = read_hub(REPO, revision=COMMIT)
    assert not hub.requests
    assert pinned.folder == cache_folder(tmp_path)
    assert pinned.cached_bytes == pinned.download_bytes > 0
    assert not pinned.hub_was_asked
    current = read_hub(REPO)
    assert [one.path for one in hub.requests] == [f"/api/models/{REPO}/revision/main"]
    assert current.checkpoint == pinned.checkpoint
    assert current.hub_was_asked


def test_a_half_downloaded_model_is_read_from_both(hub: FakeHub, tmp_path: Path) -> None:
    (download(REPO) / SECOND).unlink()
    hub.requests.clear()
    contents = read_hub(REPO, revision=COMMIT)
    assert contents.checkpoint is not None
    assert len(contents.checkpoint.files) == 2
    assert hub.sent_bytes(FIRST) == 0
    assert hub.sent_bytes(SECOND) > 0
    assert contents.download_bytes - contents.cached_bytes == len(hub.repos[REPO].files[SECOND])


def test_offline_means_the_cache_alone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(REPO)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    contents = read_hub(REPO)
    assert contents.commit == COMMIT
    assert contents.checkpoint is not None
    assert not contents.hub_was_asked
    assert download(REPO) == download(REPO, COMMIT) == folder
    with pytest.raises(
        ModelNotFoundError, match="HF_HUB_OFFLINE is set and it is not in the cache"
    ):
        read_hub("org/other")
    assert not hub.requests


def test_offline_a_planned_model_is_still_known_by_its_config(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_hub(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    contents = read_hub(REPO)
    assert json.loads(contents.config)["model_type"] == "llama"
    assert contents.checkpoint is None
    with pytest.raises(ModelNotFoundError, match="not all of its weights"):
        download(REPO)


def test_where_the_hub_is_down_a_model_in_the_cache_is_enough(hub: FakeHub) -> None:
    folder = download(REPO)
    hub.repos[REPO].api_error = (503, {})
    contents = read_hub(REPO)
    assert contents.checkpoint is not None
    assert not contents.hub_was_asked
    assert download(REPO) == folder
    (folder / SECOND).unlink()
    for act in (read_hub, download):
        with pytest.raises(ModelNotFoundError, match="HTTP 503"):
            act(REPO)


def test_hf_hub_cache_is_honoured(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert download(REPO).is_relative_to(tmp_path / "elsewhere")
