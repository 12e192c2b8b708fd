"""What Linux control groups allow this process, which in a container is less than the machine has.

A limit holds for a group and everything below it, so the process's own group and all its parents
are read, and the tightest counts. Page cache on the inactive list is given back under pressure and
therefore is not counted as used, as in `docker stats`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimit:
    """The tightest memory limit on this process."""

    limit_bytes: int
    """The lowest limit of the process's group and its parents."""
    headroom_bytes: int
    """The least that any of those limits leaves, with reclaimable page cache counted as free."""
    source: str
    """"cgroup v1" or "cgroup v2"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Version:
    source: str
    mounts: tuple[str, ...]
    limit_files: tuple[str, ...]
    usage_file: str
    reclaimable_key: str
    events_file: str
    """Has a line "oom_kill 3"."""


_V2 = _Version(
    source="cgroup v2",
    mounts=("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    # Above memory.high the kernel does not kill but stalls the process and swaps: no memory
    # that a plan should count on.
    limit_files=("memory.max", "memory.high"),
    usage_file="memory.current",
    reclaimable_key="inactive_file",
    events_file="memory.events",
)
_V1 = _Version(
    source="cgroup v1",
    mounts=("sys/fs/cgroup/memory",),
    limit_files=("memory.limit_in_bytes",),
    usage_file="memory.usage_in_bytes",
    reclaimable_key="total_inactive_file",
    events_file="memory.oom_control",
)


def memory_limit(physical_bytes: int, *, root: Path = Path("/")) -> MemoryLimit | None:
    """The limit that control groups put on this process, None where there is none.

    Args:
        physical_bytes: RAM of the machine; a limit that is not below it is no limit.
        root: Where the file system starts; tests pass a folder.
    """
    limit_bytes, headroom_bytes, source = physical_bytes, physical_bytes, ""
    for version, group in _own_groups(root):
        for folder in _folders(root, version, group):
            for file in version.limit_files:
                limit = _read_count(folder / file)
                if limit is None or limit >= physical_bytes:
                    continue
                headroom_bytes = min(headroom_bytes, max(0, limit - _used(folder, version)))
                if limit < limit_bytes:
                    limit_bytes, source = limit, version.source
    if not source:
        return None
    return MemoryLimit(limit_bytes=limit_bytes, headroom_bytes=headroom_bytes, source=source)


def oom_kills(*, root: Path = Path("/")) -> int | None:
    """Processes of this process's control group that the kernel killed for want of memory.

    Args:
        root: Where the file system starts; tests pass a folder.

    Returns:
        The count so far; None where no control group tells it.
    """
    for version, group in _own_groups(root):
        for folder in _folders(root, version, group):
            for line in _read(folder / version.events_file).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.isdecimal():
                    return int(value)
    return None


def _own_groups(root: Path) -> Iterator[tuple[_Version, PurePosixPath]]:
    """Lines such as "0::/user.slice" (v2) and "4:memory:/docker/1f3c" (v1)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield _V2, PurePosixPath(group)
        elif "memory" in controllers.split(","):
            yield _V1, PurePosixPath(group)


def _folders(root: Path, version: _Version, group: PurePosixPath) -> Iterator[Path]:
    """The group's folder and its parents up to the mount.

    In a container the path may be the host's, of which only the mount's top is visible, or lead
    out of the namespace ("/../other"): what does not exist here is skipped.
    """
    names = [name for name in group.parts if name not in ("/", "..")]
    for mount in version.mounts:
        for depth in range(len(names), -1, -1):
            folder = root.joinpath(mount, *names[:depth])
            if folder.is_dir():
                yield folder


def _used(folder: Path, version: _Version) -> int:
    used = _read_count(folder / version.usage_file) or 0
    for line in _read(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == version.reclaimable_key and value.isdecimal():
            return max(0, used - int(value))
    return used


def _read_count(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _read(file: Path) -> str:
    """A kernel file's text; empty where this kernel, or this container, does not show it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
