"""The whole way: a hub id planned from headers, downloaded, loaded as planned, and answering."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import oomproof
from oomproof.errors import InputError, LoadError, MissingDependencyError
from oomproof.models import hub_client
from oomproof.models.resolve import bundled_folder
from tests.models.fake_hub import FakeHub, FakeRepo, fake_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the bundled model as org/name, and an empty cache."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_client, "RETRY_PAUSES_S", (0.0,))
    files = {path.name: path.read_bytes() for path in bundled_folder().iterdir()}
    with fake_hub() as server:
        server.repos["org/name"] = FakeRepo(files=files)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def test_a_hub_id_is_planned_from_its_header_then_downloaded_and_run(hub: FakeHub) -> None:
    plan = oomproof.plan("org/name", format="nf4-dq")
    weights = len(hub.repos["org/name"].files["model.safetensors"])
    assert plan.fits
    assert plan.download_bytes == weights
    assert hub.sent_bytes("model.safetensors") < weights / 10
    stages: dict[str, tuple[int, int]] = {}
    with oomproof.load(
        plan, progress=lambda s, done, total: stages.update({s: (done, total)})
    ) as m:
        assert m.generate("It was a dark night", seed=1, max_new_tokens=4)
    assert stages.keys() == {"download", "load"}
    assert all(done == total > 0 for done, total in stages.values())


def test_a_tensor_that_no_parameter_wants_is_refused(tmp_path: Path) -> None:
    for path in bundled_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.9.extra.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"1 unexpected parameters: model.layers.9.extra.weight"):
        oomproof.load(tmp_path, format="bf16")


def test_options_beside_a_plan_are_refused() -> None:
    with pytest.raises(InputError, match="format cannot change it"):
        oomproof.load(oomproof.plan("tiny"), format="nf4")


def test_a_missing_run_package_is_told_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "oomproof.session.find_spec", lambda name: None if name == "bitsandbytes" else object()
    )
    with pytest.raises(
        MissingDependencyError, match=r"bitsandbytes is not installed.*oomproof\[run"
    ):
        oomproof.load("tiny")
