"""What tuning found to be the fastest launch of each product on a GPU, kept between processes.

One JSON file a kind of GPU, `tuning/<name>-<compute capability>.json` in oomproof's home; the
package may bring files of the same form in `quantization/tuning/`, which one's own go before. A
process reads them once. What is not in them is launched by rule (tiled_launch.py, wide_launch.py),
and a file that cannot be used is as good as none, said once: nobody's model stays unloaded for its
speed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from json import dumps
from math import isfinite
from pathlib import Path
from tempfile import NamedTemporaryFile

from oomproof.errors import InputError
from oomproof.home import home_folder
from oomproof.units import MIB

SCHEMA = 1
"""Of a file; it changes when a field's meaning does."""
MAX_FILE_BYTES = 4 * MIB
_REMEDY = "delete it, and run `oomproof bench MODEL --tune` again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A kind of GPU."""

    name: str
    """As CUDA has it: "NVIDIA H200"."""
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductKey:
    """All that the speed of a launch depends on, on one kind of GPU."""

    processors: int
    """Multiprocessors: parts of a GPU, and GPUs of one name, may have fewer."""
    scales: str
    """Type of stored scales: "float32", "uint8" (absmax codes) or "bfloat16" (int4)."""
    normed: bool
    """Whether the input is normalised on the way in."""
    template: int
    """Tokens that the kernel is compiled for."""
    columns: int
    tiles: int
    """Of all rows."""
    unit: int
    """Tiles that belong together."""

    def __post_init__(self) -> None:
        _check_counts(self, ("processors", "template", "columns", "tiles", "unit"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedLaunch:
    """What was faster than the rule's launch of a product."""

    product: ProductKey
    warps: int
    """Of a block: they tell kernels of the same template apart."""
    splits: int
    default_us: float
    """Time of the rule's launch."""
    us: float
    """Time of this one."""

    def __post_init__(self) -> None:
        _check_counts(self, ("warps", "splits"))
        if not (isfinite(self.default_us) and 0 < self.us < self.default_us):
            raise ValueError(f"{self.us} us are no less than the default's {self.default_us}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningFile:
    """A file."""

    schema: int
    device: str
    """Its GPU's name."""
    capability: tuple[int, int]
    date: str
    """Of the last tuning, ISO 8601."""
    versions: str
    """What the last tuning ran on."""
    entries: tuple[TunedLaunch, ...]


def _check_counts(value: object, names: Sequence[str]) -> None:
    for name in names:
        if getattr(value, name) < 1:
            raise ValueError(f"{name} {getattr(value, name)} is not at least 1")


def tuned_launch(gpu: Gpu, product: ProductKey) -> TunedLaunch | None:
    """What tuning found for a product; None where the rule holds.

    It may ask for what a launch cannot have: the kernel changes, and so does what it needs.
    """
    return tuned_launches(gpu).get(product)


@cache
def tuned_launches(gpu: Gpu) -> Mapping[ProductKey, TunedLaunch]:
    """All that is known for a kind of GPU; read once a process."""
    found: dict[ProductKey, TunedLaunch] = {}
    for name, data in (_read_bundled(gpu), _read_own(gpu)):
        if data is None:
            continue
        try:
            entries = parse_file(data, name, gpu).entries
        except InputError as error:
            # Without a handler of somebody's, logging writes it to stderr.
            logging.getLogger(__name__).warning(
                "warning: %s (until then products are launched as if never tuned)", error
            )
            continue
        found |= {entry.product: entry for entry in entries}
    return found


def parse_file(data: bytes | str, name: str, gpu: Gpu) -> TuningFile:
    """Reads a file strictly.

    Args:
        data: Its content; the reason why there is none, where it is a str.
        name: Named in the error.
        gpu: What it must be of.

    Raises:
        InputError: It is no such file.
    """
    from pydantic import TypeAdapter, ValidationError

    if isinstance(data, str):
        raise InputError(f"{name}: cannot be read ({data})", remedy=_REMEDY)
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"{name}: is larger than {MAX_FILE_BYTES} bytes", remedy=_REMEDY)
    try:
        found = TypeAdapter(TuningFile).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise InputError(f"{name}: {where}: {first['msg']}", remedy=_REMEDY) from None
    if found.schema != SCHEMA:
        raise InputError(f"{name}: tuning schema {found.schema} is not {SCHEMA}", remedy=_REMEDY)
    if (found.device, found.capability) != (gpu.name, gpu.capability):
        raise InputError(
            f"{name}: is of {found.device[:80]!r}, not of {gpu.name!r}", remedy=_REMEDY
        )
    return found


def own_file(gpu: Gpu) -> Path:
    """Where what was tuned here is kept.

    Raises:
        InputError: This user has no home.
    """
    try:
        return home_folder() / "tuning" / _file_name(gpu)
    except RuntimeError as error:
        raise InputError(f"no place to keep tuning: {error}", remedy="set OOMPROOF_HOME") from None


def claim_file(gpu: Gpu) -> Path:
    """`own_file`, once it is sure that it can be written: before minutes are spent on it.

    Raises:
        InputError: It cannot be.
    """
    path = own_file(gpu)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        NamedTemporaryFile(dir=path.parent, suffix=".tmp").close()
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def write_launches(
    gpu: Gpu, measured: Collection[ProductKey], found: Sequence[TunedLaunch], versions: str
) -> Path:
    """Keeps what tuning found, beside what is known of other products; whole or not at all.

    Args:
        gpu: Where it was measured.
        measured: All products that were; for those that are not in `found` the rule holds again.
        found: The winners.
        versions: What it ran on.

    Raises:
        InputError: The file cannot be written.
    """
    path = own_file(gpu)
    data = _read_own(gpu)[1]
    kept: dict[ProductKey, TunedLaunch] = {}
    # Reading it said what is wrong with one that is damaged; this mends it.
    with suppress(InputError):
        known = () if data is None else parse_file(data, str(path), gpu).entries
        kept = {entry.product: entry for entry in known if entry.product not in measured}
    entries = {**kept, **{entry.product: entry for entry in found}}
    written = TuningFile(
        schema=SCHEMA,
        device=gpu.name,
        capability=gpu.capability,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions,
        entries=tuple(entries.values()),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            try:
                file.write(dumps(asdict(written), indent=1).encode())
                file.flush()
                Path(file.name).replace(path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _unwritable(path, error) from None
    tuned_launches.cache_clear()
    return path


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror})", remedy="set OOMPROOF_HOME")


def _file_name(gpu: Gpu) -> str:
    """Such as "NVIDIA-H200-9.0.json"."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", gpu.name).strip("-.")
    return f"{name}-{gpu.capability[0]}.{gpu.capability[1]}.json"


def _read_bundled(gpu: Gpu) -> tuple[str, bytes | str | None]:
    file = files("oomproof").joinpath("quantization", "tuning", _file_name(gpu))
    return str(file), file.read_bytes() if file.is_file() else None


def _read_own(gpu: Gpu) -> tuple[str, bytes | str | None]:
    """(Its name, its content); None where there is none, the reason where it cannot be read."""
    try:
        path = own_file(gpu)
    except InputError:
        return "", None
    try:
        with path.open("rb") as file:
            return str(path), file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return str(path), None
    except OSError as error:
        return str(path), error.strerror or type(error).__name__
