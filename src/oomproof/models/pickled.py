"""Checkpoints that are pickles: never opened in this process, and only where the user allows it.

A pickle can run code when it is opened. torch's `weights_only` reader makes nothing but tensors of
it, and even that happens in a process of its own, without GPUs, tokens or most of the environment
(conversion/unpickle.py). That process writes safetensors files, and says in lines of JSON how far
it is; nothing else comes back. What it wrote is kept in oomproof's home under a name that the
source's files, their sizes and times decide, and is read as strictly as any other folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

from oomproof.errors import CheckpointError, MissingDependencyError
from oomproof.home import home_folder
from oomproof.models.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    PICKLE_FILE,
    PICKLE_INDEX_FILE,
    SINGLE_FILE,
    TOKENIZER_FILES,
    missing_config,
    parse_index,
)
from oomproof.models.folder import list_folder, read_bounded
from oomproof.models.headers import shorten
from oomproof.units import GIB, MIB, format_bytes

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""

_LAYOUT = 1
"""Of what is kept; a new one makes old folders be left aside."""
_SPARE_BYTES = 64 * MIB
"""Of the disk, beside what is written."""
_MAX_SMALL_BYTES = GIB
_MAX_LINE_BYTES = 65_536
_TAIL_BYTES = 2_000
_KEPT_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
    "TEMP",
)
_FIXED_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
}
_LEFT_OVER_S = 86_400
"""Age of what a killed run left: younger ones may be another machine's, which has its own pids."""
_LEFT_OVER = re.compile(r"\.[0-9a-f]{32}\.(?P<pid>[0-9]{1,10})\..*", re.ASCII)


def unpickled(folder: Path, progress: Progress | None = None) -> Path:
    """A folder with the same model in safetensors; the folder itself where it has them.

    Raises:
        ModelNotFoundError: There is no such folder.
        CheckpointError: The pickle holds more than tensors, is damaged, or the disk is too small.
        MissingDependencyError: torch is not installed.
    """
    names = list_folder(folder)
    if {SINGLE_FILE, INDEX_FILE} & names or not {PICKLE_FILE, PICKLE_INDEX_FILE} & names:
        return folder
    if CONFIG_FILE not in names:
        raise missing_config(names, location=str(folder))
    folder = folder.resolve()
    small = [n for n in (CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES) if n in names]
    shards = _shards(folder, names)
    sizes = {name: _size(folder / name) for name in shards}
    key = _key(folder, [*small, *shards, *({PICKLE_INDEX_FILE} & names)])
    kept = _kept_in(folder)
    final = kept / key
    if final.is_dir():
        return final
    _make_room(folder, kept, sum(sizes.values()))
    with _explained(kept):
        made = Path(tempfile.mkdtemp(prefix=f".{key}.{os.getpid()}.", dir=kept))
    try:
        with _explained(kept):
            for name in small:
                if _size(folder / name) <= _MAX_SMALL_BYTES:
                    _copy(folder / name, made / name)
        _convert(folder, made, sizes, progress)
        with _explained(kept):
            if not final.is_dir():
                _take_its_name(made, final)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return final


def _kept_in(folder: Path) -> Path:
    try:
        return home_folder() / "unpickled"
    except RuntimeError as error:
        raise CheckpointError(
            str(folder), f"has no place to be converted to: {error}", remedy="set OOMPROOF_HOME"
        ) from None


def _shards(folder: Path, names: frozenset[str]) -> tuple[str, ...]:
    """The pickles of a model, as transformers chooses them."""
    if PICKLE_FILE in names:
        return (PICKLE_FILE,)
    index = folder / PICKLE_INDEX_FILE
    weight_map = parse_index(
        read_bounded(index, bound_bytes=MAX_INDEX_BYTES), location=str(index), ending=".bin"
    )
    listed = sorted(set(weight_map.values()))
    for name in listed:
        if name not in names:
            raise CheckpointError(str(folder / name), f"is missing, {PICKLE_INDEX_FILE} names it")
    return tuple(listed)


def _size(path: Path) -> int:
    with _explained(path):
        if not path.is_file():
            raise CheckpointError(str(path), "is no regular file")
        return path.stat().st_size


def _key(folder: Path, names: Iterable[str]) -> str:
    """Changes with the place, the names, sizes and times of what is read."""
    digest = hashlib.sha256(f"{_LAYOUT}\0{folder}\0".encode(errors="surrogatepass"))
    for name in sorted(names):
        with _explained(folder / name):
            found = (folder / name).stat()
        digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:32]


def _make_room(folder: Path, kept: Path, needed_bytes: int) -> None:
    """Removes what runs left that were killed, and compares what is needed with what is free."""
    with _explained(kept):
        kept.mkdir(parents=True, exist_ok=True)
        for path in kept.iterdir():
            match = _LEFT_OVER.fullmatch(path.name)
            if match is None or time.time() - path.stat().st_mtime < _LEFT_OVER_S:
                continue
            if not _is_running(int(match["pid"])):
                shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(kept).free
    if needed_bytes + _SPARE_BYTES > free:
        raise CheckpointError(
            str(folder),
            f"needs {format_bytes(needed_bytes)} in {kept} to be kept as safetensors, and the disk "
            f"has {format_bytes(free)} free",
            remedy="free some space, or set OOMPROOF_HOME to a larger disk",
        )


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        return True
    return True


def _copy(source: Path, final: Path) -> None:
    with source.open("rb") as origin, final.open("xb") as copy:
        shutil.copyfileobj(origin, copy)
        copy.flush()
        os.fsync(copy.fileno())


def _take_its_name(made: Path, final: Path) -> None:
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():  # another process was faster
            raise


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The child's variables, all of them: this process's import path, and no token or GPU."""
    kept = {name: environ[name] for name in _KEPT_VARIABLES if name in environ}
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return kept | _FIXED_VARIABLES | {"PYTHONPATH": path}


def _convert(folder: Path, made: Path, sizes: Mapping[str, int], progress: Progress | None) -> None:
    """Runs the child; it ends when this process does, or when this call is interrupted."""
    command = [sys.executable, "-P", "-m", "oomproof.conversion.unpickle", str(made)]
    with tempfile.TemporaryFile() as talk:
        process = subprocess.Popen(
            command + [str(folder / name) for name in sizes],
            env=environment(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=talk,
        )
        try:
            assert process.stdout is not None
            said = _listen(process.stdout, sum(sizes.values()), progress)
            code = process.wait()
        finally:
            # Whatever happened: neither a process nor a pipe is left.
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if said is None or code != 0:
            _explain(folder, next(iter(sizes)), said, code, _tail(talk))


def _listen(
    lines: IO[bytes], total_bytes: int, progress: Progress | None
) -> Mapping[str, object] | None:
    """The child's last word: {} where it is done, an error, or None where there was none."""
    while line := lines.readline(_MAX_LINE_BYTES):
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(said, dict):
            return None
        if said.get("done") is True:
            return {}
        written = said.get("bytes")
        if not isinstance(written, int):
            return said
        if progress is not None:
            progress(min(written, total_bytes), total_bytes)
    return None


def _explain(
    folder: Path, first: str, said: Mapping[str, object] | None, code: int, tail: str
) -> NoReturn:
    if said is None or not isinstance(said.get("problem"), str):
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        last = f": {shorten(tail)}" if tail else ""
        raise CheckpointError(
            str(folder / first),
            f"the process that read it ended with {ended}{last}",
            remedy="the file is damaged or unsafe; download it again, or use safetensors",
        )
    if said.get("missing") == "torch":
        raise MissingDependencyError("torch", install="pip install 'oomproof[run]'")
    file, remedy = said.get("file"), said.get("remedy")
    raise CheckpointError(
        file if isinstance(file, str) else str(folder / first),
        str(said["problem"]),
        remedy=remedy if isinstance(remedy, str) else None,
    )


def _tail(talk: IO[bytes]) -> str:
    """The last line that the child printed."""
    talk.seek(0, os.SEEK_END)
    talk.seek(max(0, talk.tell() - _TAIL_BYTES))
    lines = talk.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the system refuses into one error."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            str(path),
            f"cannot be used ({error.strerror or error})",
            remedy="give a folder that can be read, and set OOMPROOF_HOME to one to be written",
        ) from error
