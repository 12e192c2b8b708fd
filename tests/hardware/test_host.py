from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from oomproof.hardware.host import download_folder, free_disk_bytes, probe_host, sysctl
from oomproof.units import GIB


@pytest.fixture(autouse=True)
def linux_with_64_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("platform.system", lambda: "Linux")


def limited(root: Path, *, limit_bytes: int, used_bytes: int) -> Path:
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (folder / "memory.max").write_text(f"{limit_bytes}\n")
    (folder / "memory.current").write_text(f"{used_bytes}\n")
    return root


def test_without_a_limit_ram_is_the_machines(tmp_path: Path) -> None:
    host = probe_host(root=tmp_path)
    assert (host.total_ram_bytes, host.available_ram_bytes) == (64 * GIB, 40 * GIB)
    assert host.ram_limit_source == "physical"
    assert host.cpu_count >= 1


def test_in_a_container_ram_is_what_the_cgroup_allows(tmp_path: Path) -> None:
    host = probe_host(root=limited(tmp_path, limit_bytes=16 * GIB, used_bytes=6 * GIB))
    assert (host.total_ram_bytes, host.available_ram_bytes) == (16 * GIB, 10 * GIB)
    assert host.ram_limit_source == "cgroup v2"


def test_a_full_machine_has_less_than_the_cgroup_would_allow(tmp_path: Path) -> None:
    host = probe_host(root=limited(tmp_path, limit_bytes=60 * GIB, used_bytes=0))
    assert host.available_ram_bytes == 40 * GIB


@pytest.mark.parametrize(
    ("cpuinfo", "name", "features"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_bf16 vme\n",
            "AMD EPYC",
            {"avx2", "avx512f", "avx512_bf16"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16\n", None, {"asimd", "sve", "bf16"}),
    ],
)
def test_cpu_name_and_features_come_from_cpuinfo(
    tmp_path: Path, cpuinfo: str, name: str | None, features: set[str]
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    host = probe_host(root=tmp_path)
    assert host.cpu_features == features
    assert name is None or host.cpu_name == name


def test_where_there_is_no_cpuinfo_no_features_are_claimed(tmp_path: Path) -> None:
    assert probe_host(root=tmp_path).cpu_features == frozenset()


def test_a_mac_names_its_processor_through_sysctl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("oomproof.hardware.host.sysctl", lambda name: f"<{name}>")
    assert probe_host(root=tmp_path).cpu_name == "<machdep.cpu.brand_string>"


def test_sysctl_is_silent_where_it_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("subprocess.run", missing)
    assert sysctl("hw.memsize") == ""


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, Path("/a")),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, Path("/b/hub")),
        ({"XDG_CACHE_HOME": "/c"}, Path("/c/huggingface/hub")),
        ({}, Path("~/.cache/huggingface/hub").expanduser()),
    ],
)
def test_the_download_folder_follows_the_hubs_own_variables(
    environ: dict[str, str], folder: Path
) -> None:
    assert download_folder(environ) == folder


def test_free_disk_is_asked_at_the_nearest_parent_that_exists(tmp_path: Path) -> None:
    free = free_disk_bytes(tmp_path / "not" / "there" / "yet")
    assert free is not None
    assert free > 0
    assert probe_host(environ={"HF_HOME": str(tmp_path)}).free_disk_bytes is not None
