"""Machine code that was compiled once, kept as files for the next start.

A file is the cubin (or PTX) with a digest behind it, named by everything that decides its bytes:
text, headers, options, compute capability, NVRTC. A start that finds its files does not load NVRTC.
Nothing here fails for the disk's sake: what cannot be read is compiled, what cannot be written is
used from memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from oomproof.home import home_folder
from oomproof.kernels.compiler import compile_options, compile_program, installed_nvrtc
from oomproof.kernels.source import Program
from oomproof.units import MIB

MAX_CACHE_BYTES = 128 * MIB
"""Above it the oldest files go, down to half: each release leaves those of the one before."""
_DIGEST_BYTES = hashlib.sha256().digest_size


def images(
    programs: Sequence[Program], capability: tuple[int, int], *, folder: Path | None = None
) -> list[bytes]:
    """Machine code of each program, compiled at the same time where it is not kept.

    Args:
        programs: What to compile.
        capability: Compute capability of the GPUs that will run it.
        folder: Where files are kept; `kernels/` in oomproof's home where none is named.

    Raises:
        KernelCompileError: NVRTC refuses a text.
        MissingDependencyError: NVRTC is needed, and not installed.
        NotRunnableError: NVRTC knows no architecture that such a GPU runs.
    """
    kept_in = folder or cache_folder()
    compiler = installed_nvrtc()
    keys = [key_of(program, capability, compiler) for program in programs]
    found = [read_image(kept_in, key) for key in keys]
    missing = [index for index, image in enumerate(found) if image is None]
    if missing:
        workers = min(len(missing), os.cpu_count() or 1)
        with ThreadPoolExecutor(workers, thread_name_prefix="nvrtc") as pool:
            made = pool.map(lambda index: compile_program(programs[index], capability), missing)
            for index, compiled in zip(missing, made, strict=True):
                found[index] = compiled.image
                write_image(kept_in, keys[index], compiled.image)
    return [image for image in found if image is not None]


def cache_folder() -> Path | None:
    """Where files are kept by default; None for a user without a home."""
    try:
        return home_folder() / "kernels"
    except RuntimeError:
        return None


def key_of(program: Program, capability: tuple[int, int], compiler: str) -> str:
    """Name of a program's file: equal for equal bytes, whoever compiles."""
    digest = hashlib.sha256()
    target = f"{capability[0]}.{capability[1]}" if program.only is None else program.only.target
    parts = [compiler, target, *compile_options(program)]
    for name, text in ((program.name, program.text), *sorted(program.headers.items())):
        parts += [name, text]
    for part in parts:
        data = part.encode()
        # Its length first: two lists of parts never read the same.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read_image(folder: Path | None, key: str) -> bytes | None:
    """A kept image; None where there is none, or one that is damaged."""
    if folder is None:
        return None
    try:
        data = _file(folder, key).read_bytes()
    except OSError:
        return None
    image, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    return image if image and digest == _digest(key, image) else None


def write_image(folder: Path | None, key: str, image: bytes) -> None:
    """Keeps an image, whole or not at all; a folder that takes nothing is no failure."""
    if folder is None:
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(folder, len(image))
        with NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            try:
                file.write(image + _digest(key, image))
                file.flush()
                Path(file.name).replace(_file(folder, key))
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.cubin"


def _digest(key: str, image: bytes) -> bytes:
    """The key is in it, so that a file under another's name is damage."""
    return hashlib.sha256(key.encode() + image).digest()


def _make_room(folder: Path, needed_bytes: int) -> None:
    """Removes the oldest files where the folder would grow above its bound."""
    files = []
    for path in (*folder.glob("*.cubin"), *folder.glob("*.tmp")):
        # Another process may remove it at the same time.
        with suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files) + needed_bytes
    if total <= MAX_CACHE_BYTES:
        return
    for _, size, path in sorted(files):
        if total <= MAX_CACHE_BYTES // 2:
            return
        path.unlink(missing_ok=True)
        total -= size
