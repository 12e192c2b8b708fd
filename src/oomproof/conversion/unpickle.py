"""The process that opens a pickle: `python -m oomproof.conversion.unpickle OUT FILE…`.

It is started by models/pickled.py with an environment that has nothing to steal, and ends with the
process that started it. torch.load(weights_only=True, mmap=True) makes tensors whose bytes stay in
the file; they are written one after the other, so that host memory does not grow with the model.

Lines on stdout, each an object: {"bytes": written so far}, and at the end {"done": true} or
{"problem", "file", "remedy"}.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oomproof.errors import CheckpointError, MissingDependencyError, OomproofError
from oomproof.models.checkpoint import INDEX_FILE, SINGLE_FILE
from oomproof.models.headers import MAX_TENSORS, SAFETENSORS_NAMES, shorten
from oomproof.units import MIB, format_bytes

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 16 * MIB
_ZIP = b"PK\x03\x04"
_MOST_TIMES = 2
"""How many times its own size a file may become: a tied head is written twice."""
_SLACK_BYTES = 64 * MIB
_MAX_NAME = 1024
_UNSUPPORTED = re.compile(r"(?:GLOBAL |global |class )(?P<name>[\w.]{1,200})")
_UNSAFE = "use safetensors; do not open this file otherwise unless you know who made it"


def convert(out: Path, files: Sequence[Path]) -> None:
    """Writes what the files hold as safetensors into `out`.

    Raises:
        CheckpointError: One of them holds more than tensors, or is damaged; the disk is full.
        MissingDependencyError: torch is not installed.
    """
    total = sum(path.stat().st_size for path in files)
    _bound_files(_MOST_TIMES * total + _SLACK_BYTES)
    weight_map: dict[str, str] = {}
    done = 0
    for number, path in enumerate(files):
        name = SINGLE_FILE
        if len(files) > 1:
            name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        tensors = load(path)
        for tensor in tensors:
            if tensor in weight_map:
                raise CheckpointError(
                    str(path), f"tensor {shorten(tensor)} is in {weight_map[tensor]} too"
                )
            weight_map[tensor] = name
        for written in _write(out / name, tensors, path):
            _say(bytes=done + written)
        done += path.stat().st_size
    if len(files) > 1:
        index = {"metadata": {"total_size": done}, "weight_map": weight_map}
        (out / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def load(path: Path) -> Mapping[str, torch.Tensor]:
    """Name → tensor, whose bytes are in the file still.

    Raises:
        CheckpointError: It holds anything else.
        MissingDependencyError: torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise MissingDependencyError("torch", install="pip install 'oomproof[run]'") from None
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            raise CheckpointError(
                str(path),
                "is not in the format that torch.save writes since 1.6, which alone is read",
                remedy="save it again where you trust it, or use safetensors",
            )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        match = _UNSUPPORTED.search(str(error))
        what = f" ({match['name']})" if match else ""
        raise CheckpointError(
            str(path),
            f"holds more than tensors{what}, which can run code, and is not opened",
            remedy=_UNSAFE,
        ) from None
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError) as error:
        line = str(error).partition("\n")[0]
        raise CheckpointError(
            str(path), f"cannot be read: {shorten(line)}", remedy="download it again"
        ) from None
    return _checked(path, found)


def _checked(path: Path, found: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, every one of a kind that safetensors has."""
    import torch

    if not isinstance(found, dict) or not found:
        raise CheckpointError(str(path), "holds no tensors by name")
    if len(found) > MAX_TENSORS:
        raise CheckpointError(str(path), f"holds more than {MAX_TENSORS:,} tensors")
    total = 0
    for name, tensor in found.items():
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or name == "__metadata__":
            raise CheckpointError(str(path), f"holds something under the name {shorten(name)}")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                str(path), f"holds {type(tensor).__name__} {shorten(name)}, which is no tensor"
            )
        plain = tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu" or _name_of(tensor) not in SAFETENSORS_NAMES:
            raise CheckpointError(
                str(path), f"tensor {shorten(name)} is {tensor.dtype}, {tensor.layout}"
            )
        total += tensor.numel() * tensor.element_size()
    size = path.stat().st_size
    if total > _MOST_TIMES * size + _SLACK_BYTES:
        raise CheckpointError(
            str(path),
            f"has {format_bytes(size)}, and its tensors would take {format_bytes(total)}",
            remedy="the file is damaged or unsafe; download it again",
        )
    return dict(found)


def _name_of(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write(path: Path, tensors: Mapping[str, torch.Tensor], source: Path) -> Iterator[int]:
    """Writes a safetensors file; yields the bytes written, at most once a piece."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[_name_of(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    try:
        with path.open("xb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(len(raw).to_bytes(8, "little") + raw))
            written = 0
            for tensor in tensors.values():
                for piece in _pieces(tensor):
                    _write_all(file.fileno(), piece)
                    written += len(piece)
                    yield written
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            str(source),
            f"cannot be kept as safetensors in {path.parent.parent} ({error.strerror or error})",
            remedy="free some space, or set OOMPROOF_HOME to a larger disk",
        ) from None


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Its bytes in row-major order, a few at a time."""
    import torch

    # Views of others, transposed or shared, are written whole, each for itself.
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for piece in flat.split(_PIECE_BYTES):
        yield memoryview(piece.numpy())


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _bound_files(most_bytes: int) -> None:
    """No file is larger, and no memory image is left."""
    if os.name != "posix":
        return
    import resource

    for what, most in ((resource.RLIMIT_FSIZE, most_bytes), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (allowed, hard))


def _end_with_parent() -> None:
    """Ends this process when its stdin does: the parent holds the other end, and never writes."""

    def wait() -> None:
        with suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> int:
    """Converts, and says how it went."""
    _end_with_parent()
    out, *files = map(Path, arguments)
    try:
        convert(out, files)
    except MissingDependencyError as error:
        _say(problem=str(error), missing="torch")
        return 1
    except OomproofError as error:
        file = error.file if isinstance(error, CheckpointError) else str(files[0])
        problem = error.message.removeprefix(f"{file}: ")
        _say(problem=problem, file=file, remedy=error.remedy)
        return 1
    except OSError as error:
        _say(problem=f"cannot be read ({error.strerror or error})", file=str(files[0]))
        return 1
    _say(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
