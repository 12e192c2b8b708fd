from __future__ import annotations

from pathlib import Path

import pytest

from oomproof.hardware.cgroup import MemoryLimit, memory_limit, oom_kills
from oomproof.units import GIB

PHYSICAL = 64 * GIB
V1_UNLIMITED = 9223372036854771712


def write(root: Path, **files: object) -> None:
    """Writes files; "__" in a keyword stands for "/"."""
    for name, content in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")


def group(
    root: Path,
    folder: str,
    *,
    maximum: object,
    used: int = 0,
    reclaimable: int = 0,
    high: object = "max",
) -> None:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{maximum}\n")
    (path / "memory.high").write_text(f"{high}\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\nactive_file 7\n")


def group_v1(root: Path, folder: str, *, limit: int, used: int = 0, reclaimable: int = 0) -> None:
    path = root / "sys/fs/cgroup/memory" / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (path / "memory.usage_in_bytes").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {reclaimable}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, proc__self__cgroup="0::/pod/job")
    return tmp_path


def limit_of(root: Path) -> MemoryLimit:
    found = memory_limit(PHYSICAL, root=root)
    assert found is not None
    return found


def test_no_proc_means_no_limit(tmp_path: Path) -> None:
    assert memory_limit(PHYSICAL, root=tmp_path) is None


def test_max_is_no_limit(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum="max")
    assert memory_limit(PHYSICAL, root=root) is None


def test_a_v2_limit_counts_used_memory_without_reclaimable_page_cache(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum=8 * GIB, used=5 * GIB, reclaimable=2 * GIB)
    assert limit_of(root) == MemoryLimit(
        limit_bytes=8 * GIB, headroom_bytes=5 * GIB, source="cgroup v2"
    )


def test_a_parents_lower_limit_counts(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum=32 * GIB, used=1 * GIB)
    group(root, "sys/fs/cgroup/pod", maximum=16 * GIB, used=4 * GIB)
    assert limit_of(root).limit_bytes == 16 * GIB
    assert limit_of(root).headroom_bytes == 12 * GIB


def test_a_parent_that_siblings_fill_leaves_less_than_the_own_lower_limit(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum=8 * GIB, used=1 * GIB)
    group(root, "sys/fs/cgroup/pod", maximum=16 * GIB, used=14 * GIB)
    assert limit_of(root).limit_bytes == 8 * GIB
    assert limit_of(root).headroom_bytes == 2 * GIB


def test_memory_high_is_a_limit_because_the_kernel_stalls_above_it(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum=8 * GIB, high=6 * GIB, used=1 * GIB)
    assert limit_of(root).limit_bytes == 6 * GIB
    assert limit_of(root).headroom_bytes == 5 * GIB


def test_a_limit_above_the_machines_ram_is_no_limit(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum=PHYSICAL * 2)
    assert memory_limit(PHYSICAL, root=root) is None


def test_a_group_over_its_limit_has_no_headroom(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum=8 * GIB, used=9 * GIB)
    assert limit_of(root).headroom_bytes == 0


@pytest.mark.parametrize("path", ["/", "/../../elsewhere", "/kubepods/not-visible-here"])
def test_in_a_container_the_top_of_the_mount_holds_the_limit(tmp_path: Path, path: str) -> None:
    write(tmp_path, proc__self__cgroup=f"0::{path}")
    group(tmp_path, "sys/fs/cgroup", maximum=4 * GIB, used=1 * GIB)
    assert limit_of(tmp_path).headroom_bytes == 3 * GIB


def test_a_v1_limit_counts_the_whole_trees_page_cache(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="7:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/")
    group_v1(tmp_path, ".", limit=V1_UNLIMITED)
    group_v1(tmp_path, "docker/a", limit=8 * GIB, used=6 * GIB, reclaimable=3 * GIB)
    assert limit_of(tmp_path) == MemoryLimit(
        limit_bytes=8 * GIB, headroom_bytes=5 * GIB, source="cgroup v1"
    )


def test_an_unlimited_v1_group_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="4:memory:/")
    group_v1(tmp_path, ".", limit=V1_UNLIMITED)
    assert memory_limit(PHYSICAL, root=tmp_path) is None


def test_a_v1_parent_limits_its_children(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="4:memory:/slurm/job/step")
    group_v1(tmp_path, "slurm/job", limit=8 * GIB, used=2 * GIB)
    group_v1(tmp_path, "slurm/job/step", limit=V1_UNLIMITED)
    assert limit_of(tmp_path).headroom_bytes == 6 * GIB


def test_files_that_make_no_sense_are_no_limit(root: Path) -> None:
    group(root, "sys/fs/cgroup/pod/job", maximum="garbage")
    assert memory_limit(PHYSICAL, root=root) is None


def test_the_kernels_kills_are_counted_in_either_version(tmp_path: Path) -> None:
    assert oom_kills(root=tmp_path) is None
    write(tmp_path, proc__self__cgroup="4:memory:/box\n0::/box")
    group_v1(tmp_path, "box", limit=GIB)
    (tmp_path / "sys/fs/cgroup/memory/box/memory.oom_control").write_text(
        "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"
    )
    assert oom_kills(root=tmp_path) == 4
    group(tmp_path, "sys/fs/cgroup/box", maximum=GIB)
    write(tmp_path, proc__self__cgroup="0::/box")
    (tmp_path / "sys/fs/cgroup/box/memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert oom_kills(root=tmp_path) == 2
