"""What rehearsals measured on this machine, kept for the next plan.

One JSON line a rehearsal in calibration.jsonl, in oomproof's home. Notes count for GPUs of the same
name under the same engine: the context is what was measured there, a workspace that was above its
prediction is planned with what it lacked, and speeds are corrected by what was timed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from statistics import median

from oomproof.errors import InputError
from oomproof.formats import DType, Format
from oomproof.hardware.spec import DeviceSpec
from oomproof.home import home_folder
from oomproof.memory.profiles import EngineProfile
from oomproof.units import MIB, round_up

MAX_NOTES_BYTES = 4 * MIB
_CONTEXT_SLACK_BYTES = 32 * MIB
"""What contexts of one GPU were seen to differ by (modules that load later)."""
_FP8 = "fp8"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationNote:
    """What one rehearsal measured on one device."""

    date: str
    device: str
    """The GPU's name."""
    engine: str
    kind: str
    """Kind of weights: "16-bit", "8-bit", "fp8" or "4-bit"."""
    versions: str
    model: str
    format: str
    context: int
    concurrency: int
    failed: str | None
    """Where and why the rehearsal ended early; None for one that ran through."""
    cuda_context_bytes: int
    """0 where it was not reached."""
    workspace_excess_bytes: int
    """Workspace measured less predicted; of a failed rehearsal, at least what was asked for."""
    decode_factor: float | None
    """Measured over predicted time of a decode step."""
    prefill_factor: float | None


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of a machine."""

    entries: tuple[CalibrationNote, ...] = ()

    def adjust(self, profile: EngineProfile, device: DeviceSpec, kind: str) -> EngineProfile:
        """The engine's profile on a device, with what was measured there."""
        contexts = [note.cuda_context_bytes for note in self._of(device, profile.engine)]
        found = self._of(device, profile.engine, kind)
        excess = max([0, *(note.workspace_excess_bytes for note in found)])
        if max(contexts, default=0) > 0:
            context_bytes = round_up(max(contexts), 2 * MIB) + _CONTEXT_SLACK_BYTES
            profile = replace(profile, context_bytes=context_bytes)
        if excess:
            profile = replace(
                profile, fragmentation_bytes=profile.fragmentation_bytes + round_up(excess, MIB)
            )
        return profile

    def speed_factors(self, device: DeviceSpec, engine: str, kind: str) -> tuple[float, float]:
        """(decode, prefill): measured over predicted time; 1 where nothing was measured."""
        found = self._of(device, engine, kind)
        decode = [note.decode_factor for note in found if note.decode_factor]
        prefill = [note.prefill_factor for note in found if note.prefill_factor]
        return (median(decode) if decode else 1.0, median(prefill) if prefill else 1.0)

    def describe(self, device: DeviceSpec, engine: str) -> str | None:
        """Such as "2 rehearsals on NVIDIA H200, the last one of 2026-11-21"; None for none."""
        found = self._of(device, engine)
        if not found:
            return None
        count = "1 rehearsal" if len(found) == 1 else f"{len(found)} rehearsals"
        return f"{count} on {device.name}, the last one of {found[-1].date}"

    def _of(
        self, device: DeviceSpec, engine: str, kind: str | None = None
    ) -> list[CalibrationNote]:
        return [
            note
            for note in self.entries
            if (note.device, note.engine) == (device.name, engine) and kind in (None, note.kind)
        ]


def kind_of(weight_format: Format) -> str:
    """Formats of one kind share their notes."""
    if not weight_format.is_quantized:
        return "16-bit"
    if weight_format.weight_dtype is DType.FLOAT8_E4M3FN:
        return _FP8
    return "4-bit" if weight_format.bits_per_weight < 8 else "8-bit"


def notes_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where notes are kept."""
    return home_folder(environ) / "calibration.jsonl"


def read_notes(path: Path | None = None) -> Notes:
    """The notes of this machine; none where no rehearsal was made.

    Raises:
        InputError: The file cannot be read, or a line of it is no note.
    """
    path = notes_file() if path is None else path
    try:
        with path.open("rb") as file:
            data = file.read(MAX_NOTES_BYTES + 1)
    except FileNotFoundError:
        return Notes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    remedy = "delete the file, or the line, and rehearse again"
    if len(data) > MAX_NOTES_BYTES:
        raise InputError(f"{path}: is larger than {MAX_NOTES_BYTES} bytes", remedy=remedy)
    from pydantic import TypeAdapter, ValidationError

    reader = TypeAdapter(CalibrationNote)
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            entries.append(_of_today(reader.validate_json(line)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "JSON"
            raise InputError(
                f"{path}, line {number}: {where}: {first['msg']}", remedy=remedy
            ) from None
    return Notes(tuple(entries))


def _of_today(note: CalibrationNote) -> CalibrationNote:
    """Notes of fp8 weights were once kept with those of 8-bit integers."""
    return replace(note, kind=_FP8) if (note.format, note.kind) == ("fp8", "8-bit") else note


def write_notes(notes: Sequence[CalibrationNote], path: Path | None = None) -> Path:
    """Appends notes; one write, so that two processes do not mix their lines.

    Raises:
        InputError: The file cannot be written.
    """
    path = notes_file() if path is None else path
    lines = "".join(dumps(asdict(note)) + "\n" for note in notes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror})", remedy="set OOMPROOF_HOME"
        ) from None
    return path
