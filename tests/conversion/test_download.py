"""A model of the hub is quantized while it downloads, one shard at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import pytest

from oomproof.conversion import writing
from oomproof.conversion.work import work_folder_of
from oomproof.errors import CheckpointError, OomproofError
from oomproof.models import hub_client
from oomproof.models.hub import download
from oomproof.session import quantize
from oomproof.units import MIB
from tests.conversion.jobs import files_of, in_shards, quantized
from tests.models.fake_hub import COMMIT, FakeHub, FakeRepo, fake_hub

REPO = "org/name"
SHARDS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_shards(tmp_path_factory.mktemp("source") / "model", SHARDS)


@pytest.fixture
def hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the bundled model in shards, and an empty cache."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(hub_client, "RETRY_PAUSES_S", (0.0,))
    with fake_hub() as server:
        server.repos[REPO] = FakeRepo(files=files_of(source))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What quantizing a folder with the same files brings, but for what names the source."""
    return comparable(quantized(tmp_path_factory.mktemp("expected") / "out", source, shard=MIB))


def comparable(folder: Path) -> dict[str, bytes]:
    found = files_of(folder)
    found.pop("oomproof-manifest.json")
    return found


def shards_sent(hub: FakeHub) -> int:
    """Bytes of weights that were sent in whole files, not by range for their headers."""
    return sum(
        one.sent_bytes
        for one in hub.requests
        if one.path.endswith(".safetensors") and one.asked_range is None
    )


class DiskMeter:
    """The most bytes that a folder had, looked at all the time."""

    def __init__(self, folder: Path) -> None:
        self.peak_bytes = 0
        self.most_sources = 0
        self._folder, self._stop = folder, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_arguments: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            total, sources = 0, 0
            for place, _, names in os.walk(self._folder):
                for path in (Path(place, name) for name in names):
                    with suppress(OSError):
                        total += path.stat().st_size
                    sources += ".source" in path.parts and path.suffix == ".safetensors"
            self.peak_bytes = max(self.peak_bytes, total)
            self.most_sources = max(self.most_sources, sources)


def test_the_disk_holds_the_output_and_one_source_shard_at_most(
    hub: FakeHub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    place = tmp_path / "place"
    place.mkdir()
    with DiskMeter(place) as meter:
        report = quantize(
            REPO, place / "out", device="cpu", shard=MIB, progress=lambda *one: told.append(one)
        )
    assert comparable(place / "out") == expected
    largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
    assert meter.most_sources == 1
    assert meter.peak_bytes <= report.output_bytes + largest + 64 * 1024
    assert not work_folder_of(place / "out").exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    downloads = [done for stage, done, _ in told if stage == "download"]
    assert downloads == sorted(downloads)
    assert downloads[-1] == sum(p.stat().st_size for p in source.glob("*.safetensors"))
    assert {stage for stage, _, _ in told} == {"download", "quantize"}


def test_each_shard_is_downloaded_once_though_the_run_is_killed_in_between(
    hub: FakeHub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    own, left = writing._write_shard, 3

    def killed(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return own(*arguments)

    with patch.object(writing, "_write_shard", killed), pytest.raises(KeyboardInterrupt):
        quantize(REPO, out, device="cpu", shard=MIB)
    report = quantize(REPO, out, device="cpu", shard=MIB)
    assert report.resumed_files == 2
    assert comparable(out) == expected
    assert shards_sent(hub) == sum(p.stat().st_size for p in source.glob("*.safetensors"))


def test_a_source_shard_that_a_killed_run_left_goes_before_the_next_comes(
    hub: FakeHub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with (
        patch("oomproof.conversion.sources.HubSource.release", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        quantize(REPO, place / "out", device="cpu", shard=MIB)
    with DiskMeter(place) as meter:
        quantize(REPO, place / "out", device="cpu", shard=MIB)
    assert meter.most_sources == 1
    assert comparable(place / "out") == expected


def test_a_download_that_breaks_off_is_one_error_and_goes_on_later(
    hub: FakeHub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    name = f"model-00003-of-{SHARDS:05}.safetensors"
    own = hub_client.HubClient.fetch_beside

    def failing(self: Any, repo: str, file: str, *arguments: Any) -> Path:
        if file == name:
            hub.repos[REPO].error = (403, {})
        return own(self, repo, file, *arguments)

    with (
        patch.object(hub_client.HubClient, "fetch_beside", failing),
        pytest.raises(OomproofError, match="may not read"),
    ):
        quantize(REPO, out, device="cpu", shard=MIB)
    hub.repos[REPO].error = None
    assert not out.exists()
    report = quantize(REPO, out, device="cpu", shard=MIB)
    assert report.resumed_files > 0
    assert comparable(out) == expected


def test_what_the_cache_has_is_not_downloaded_again(
    hub: FakeHub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = download(REPO)
    before = len(hub.requests)
    assert comparable(quantized(tmp_path / "out", REPO, shard=MIB)) == expected
    later = hub.requests[before:]
    assert not [one for one in later if one.method == "GET" and one.path.endswith("tensors")]
    assert folder.exists()


def test_a_shard_that_the_cache_has_is_taken_from_there_and_left(
    hub: FakeHub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folder = download(REPO)
    (folder / f"model-00002-of-{SHARDS:05}.safetensors").unlink()
    before = len(hub.requests)
    assert comparable(quantized(tmp_path / "out", REPO, shard=MIB)) == expected
    whole = [
        one.path.rpartition("/")[2]
        for one in hub.requests[before:]
        if one.method == "GET" and one.asked_range is None and one.path.endswith(".safetensors")
    ]
    assert whole == [f"model-00002-of-{SHARDS:05}.safetensors"]
    assert (folder / f"model-00001-of-{SHARDS:05}.safetensors").exists()


def test_without_the_network_the_cache_is_enough(
    hub: FakeHub,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    download(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert comparable(quantized(tmp_path / "out", REPO, shard=MIB)) == expected


def test_a_disk_without_room_for_a_shard_on_its_way_is_told_first(
    hub: FakeHub, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with patch("oomproof.conversion.writing.shutil.disk_usage") as usage:
        usage.return_value.free = sum(map(len, expected.values())) + 100_000
        with pytest.raises(CheckpointError, match=r"out: needs .* more, .* for a shard on its way"):
            quantize(REPO, tmp_path / "out", device="cpu", shard=MIB)
    assert shards_sent(hub) == 0


def test_a_file_that_changed_since_its_header_was_read_is_refused(
    hub: FakeHub, tmp_path: Path
) -> None:
    name = f"model-00001-of-{SHARDS:05}.safetensors"
    own = hub_client.HubClient.fetch_beside

    def swapped(self: Any, repo: str, file: str, *arguments: Any) -> Path:
        path = own(self, repo, file, *arguments)
        if file == name:
            other = hub.repos[REPO].files[f"model-00002-of-{SHARDS:05}.safetensors"]
            path.write_bytes(other)
        return path

    with (
        patch.object(hub_client.HubClient, "fetch_beside", swapped),
        pytest.raises(CheckpointError, match=f"{name}: is another file than its header was read"),
    ):
        quantize(REPO, tmp_path / "out", device="cpu", shard=MIB)
    assert comparable(quantized(tmp_path / "out", REPO, shard=MIB))


def test_a_download_with_a_flipped_bit_is_refused_and_comes_again(
    hub: FakeHub, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repos[REPO].tells_digests = True
    hub.repos[REPO].flips = 1
    with pytest.raises(
        CheckpointError, match=r"name/model-00001-of.*: came with sha256 .*…, the hub has .*: run"
    ):
        quantize(REPO, tmp_path / "out", device="cpu", shard=MIB)
    assert not (tmp_path / "out").exists()
    assert comparable(quantized(tmp_path / "out", REPO, shard=MIB)) == expected


def test_the_manifest_names_the_commit(hub: FakeHub, tmp_path: Path) -> None:
    out = quantized(tmp_path / "out", REPO)
    assert COMMIT in (out / "oomproof-manifest.json").read_text()
