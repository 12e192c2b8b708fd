"""What is true of a machine and its packages, as one value: everything that a check looks at.

Nothing here looks at the machine (gather.py does), so that a broken machine can be written down in
a test, or be sent as JSON and judged elsewhere. None means "not known" wherever nothing else is
said: a probe that failed or was not run leaves its facts at None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from oomproof.errors import InputError
from oomproof.hardware.spec import HostSpec

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemFacts:
    """The operating system and Python."""

    python: str
    """"3.12.3"."""
    name: str
    """"Linux", "Windows" or "Darwin"."""
    machine: str
    """Processor: "x86_64", "aarch64"."""
    release: str = ""
    """The kernel's own version."""
    wsl: bool = False
    """Linux inside of Windows, which lends it the driver."""
    container: bool = False
    physical_ram_bytes: int | None = None
    """RAM of the machine, whatever a container may take of it."""
    shared_memory_bytes: int | None = None
    """Size of /dev/shm, through which processes hand tensors to each other."""
    c_compiler: str | None = None
    """What Triton would build its launchers with: $CC, gcc or clang; None where there is none."""
    python_headers: bool | None = None
    """Whether Python.h is there, which those launchers include."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverFacts:
    """NVIDIA's driver."""

    nvml_error: str | None = None
    """Name of NVML's error ("NVML_ERROR_UNKNOWN"), None where NVML answered."""
    version: str | None = None
    cuda_version: str | None = None
    """Newest CUDA that the driver supports: "13.0"."""
    cuda_init: int | None = None
    """What cuInit answered: 0 where CUDA works, else its error number."""
    libcuda_error: str | None = None
    """Why libcuda cannot be loaded; None where it can, or was not tried."""
    gpus_on_bus: int | None = None
    """NVIDIA GPUs on the PCI bus, with or without a driver."""
    device_nodes: int | None = None
    """/dev/nvidia0, /dev/nvidia1, …"""
    device_nodes_denied: bool = False
    """Whether this user may not open one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessFacts:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    used_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuFacts:
    """One GPU as NVML describes it, whether or not CUDA_VISIBLE_DEVICES shows it."""

    index: int
    """NVML's."""
    name: str
    kind: Literal["cuda", "mps"] = "cuda"
    uuid: str = ""
    bus_id: str = ""
    error: str | None = None
    """Name of NVML's error where the GPU does not answer: "NVML_ERROR_GPU_IS_LOST"."""
    compute_capability: tuple[int, int] | None = None
    total_bytes: int | None = None
    """None for a GPU that works in the processor's RAM."""
    free_bytes: int | None = None
    mig: bool | None = None
    compute_mode: Literal["default", "exclusive", "prohibited"] | None = None
    persistence: bool | None = None
    ecc: bool | None = None
    uncorrected_errors: int | None = None
    """Since the driver was loaded."""
    remap_pending: bool | None = None
    """Whether a bad row (or page) is taken out of use at the next reset."""
    remap_failed: bool | None = None
    """Whether there is no spare row left for a bad one."""
    throttling: tuple[str, ...] = ()
    """Why it is slowed down now: "heat", "power brake", "hardware slowdown"."""
    temperature_c: int | None = None
    fabric: str | None = None
    """State of its NVSwitch fabric: "completed", "in progress", "not started"; None without one."""
    nvlinks: int | None = None
    """Links that the GPU has."""
    active_nvlinks: int | None = None
    processes: tuple[ProcessFacts, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkFacts:
    """What joins two GPUs, by their positions in `Facts.gpus`."""

    first: int
    second: int
    kind: Literal["nvlink", "pcie", "unknown"]
    peer_access: str | None = None
    """"ok", or why one GPU cannot read the other's memory: "chipset not supported"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchFacts:
    """What torch says of itself."""

    version: str
    cuda_build: str | None = None
    """CUDA version it was built for, None for a build without CUDA."""
    hip_build: str | None = None
    """ROCm version it was built for."""
    sees_cuda: bool = False
    """Whether it can use a GPU here."""
    device_count: int = 0
    architectures: tuple[str, ...] = ()
    """GPU targets it was compiled for: "sm_90", "compute_120"."""
    cxx11_abi: bool | None = None
    """C++ ABI of its libraries, which extensions must share."""
    cuda_error: str | None = None
    """Its own words on why it sees no GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialFacts:
    """Whether something small worked when it was tried."""

    works: bool
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NvrtcFacts:
    """The compiler of our CUDA sources."""

    version: str
    """"13.0"."""
    architectures: tuple[int, ...] = ()
    """What it compiles for: 90 is compute capability 9.0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequirementFacts:
    """What an installed package says that it needs of another."""

    package: str
    """Who asks: "torch", "oomproof[run]"."""
    needs: str
    """Of whom: "triton"."""
    specifier: str
    """Which versions: "==3.6.0"; empty for any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFacts:
    """Where huggingface_hub keeps what it downloads."""

    path: str
    """From "~" on where it is below the user's home."""
    writable: bool | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class XidFacts:
    """A fault of a GPU in the kernel's log."""

    bus_id: str
    code: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFacts:
    """How gathering went for one probe."""

    name: str
    seconds: float
    problem: str | None = None
    """Why it gave nothing: "no answer within 30 s"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything a check looks at."""

    system: SystemFacts
    host: HostSpec | None = None
    packages: dict[str, str] = field(default_factory=dict)
    """Installed package → version; absent ones are left out."""
    requirements: tuple[RequirementFacts, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """The environment variables that matter here; never a token."""
    driver: DriverFacts = field(default_factory=DriverFacts)
    gpus: tuple[GpuFacts, ...] = ()
    links: tuple[LinkFacts, ...] = ()
    torch: TorchFacts | None = None
    """None where torch is absent or cannot be imported."""
    torch_error: str | None = None
    triton: TrialFacts | None = None
    """Importing it."""
    bitsandbytes_binaries: tuple[str, ...] = ()
    """CUDA versions of the libraries that it ships: "cuda126"."""
    four_bit: TrialFacts | None = None
    """A product with an NF4 weight, on the GPU where torch sees one."""
    eight_bit: TrialFacts | None = None
    """A product of LLM.int8()."""
    flash_attention: TrialFacts | None = None
    """Importing the package flash-attn."""
    flash_attention_wheel: str | None = None
    """File name of the wheel it came from, which tells what it was built for."""
    nvrtc: NvrtcFacts | None = None
    nvrtc_error: str | None = None
    cache: CacheFacts | None = None
    xids: tuple[XidFacts, ...] | None = None
    """None where the kernel's log cannot be read, which is usual."""
    probes: tuple[ProbeFacts, ...] = ()


def to_plain(facts: Facts) -> dict[str, Any]:
    """The facts as JSON has them."""
    plain: dict[str, Any] = _adapter(Facts).dump_python(facts, mode="json")
    if plain["host"] is not None:
        plain["host"]["cpu_features"].sort()
    return plain


def from_plain(plain: object) -> Facts:
    """Facts that to_plain wrote, or `doctor --json` with them inside.

    Raises:
        InputError: They are not facts.
    """
    if isinstance(plain, dict) and "facts" in plain:
        plain = plain["facts"]
    try:
        return read_plain(plain, Facts)
    except ValueError as error:
        raise InputError(
            f"these are no facts of a machine: {error}",
            remedy="give what `oomproof doctor --json` wrote",
        ) from None


def read_plain(plain: object, kind: type[T]) -> T:
    """One of the values above, from what JSON has of it.

    Raises:
        ValueError: It is none; the field is named.
    """
    from pydantic import ValidationError

    try:
        value: T = _adapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ValueError(f"{where}: {first['msg']}") from None
    return value


def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
