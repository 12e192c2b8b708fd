"""What each cause means, in plain words, and what mends it. One entry a cause."""

from __future__ import annotations

from dataclasses import dataclass

from oomproof.faults.fault import Cause, FaultClass


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What a user is told of a cause."""

    what: str
    """What happened, a sentence without its end."""
    remedies: tuple[str, ...] = ()
    """What to do, the surest first."""
    plans: bool = False
    """Whether a plan says what would have worked."""
    blames: bool = False
    """Whether some term of a GPU's memory was to blame."""


_DOCTOR = "`oomproof doctor` names the line that mends it"
_HOST_PLAN = (
    "`oomproof plan MODEL` says what loading needs in host RAM, and what a container allows"
)
_RESTART = "start the process again: nothing of it can be trusted with CUDA any more"

WORDS: dict[Cause, Words] = {
    Cause.GPU_MEMORY: Words(what="the GPU had no room for a tensor", plans=True, blames=True),
    Cause.LIBRARY_MEMORY: Words(
        what="a CUDA library found no GPU memory for itself: PyTorch's allocator had taken "
        "nearly all of it",
        plans=True,
        blames=True,
    ),
    Cause.NCCL_MEMORY: Words(
        what="NCCL found no GPU memory for its buffers, which lie outside PyTorch's allocator",
        plans=True,
        blames=True,
    ),
    Cause.KV_CACHE: Words(
        what="after its weights the engine had no room for the KV cache that it was asked for",
        remedies=("ask for a shorter context (--max-model-len), or weights of fewer bits",),
        plans=True,
    ),
    Cause.MODULES_ON_CPU: Words(
        what="a device map left modules to the CPU or the disk, and bitsandbytes does not run "
        "there. The map counts with 81 % of the free memory and wrong bytes for 4-bit weights, "
        "so it does that to models that fit",
        plans=True,
    ),
    Cause.DOES_NOT_FIT: Words(what="the plan needs more memory than there is", plans=True),
    Cause.HOST_MEMORY: Words(
        what="the computer's own memory (RAM) ran out, not the GPU's",
        remedies=(_HOST_PLAN,),
    ),
    Cause.SHARED_MEMORY_FILES: Words(
        what="the files that processes share memory through (/dev/shm) have no room; containers "
        "get 64 MB unless told otherwise",
        remedies=("start the container with --shm-size=8g or --ipc=host",),
    ),
    Cause.KILLED: Words(
        what="the process was killed from outside (SIGKILL), nearly always by the kernel because "
        "the RAM of the machine or of the container was full; Python has no say in it, so there "
        "is no traceback",
        remedies=(
            "`dmesg | grep -i 'killed process'` tells whether it was the kernel",
            _HOST_PLAN,
        ),
    ),
    Cause.KILLED_FOR_MEMORY: Words(
        what="the kernel killed the process because the RAM of the machine or of the container "
        "was full",
        remedies=(_HOST_PLAN,),
    ),
    Cause.CRASHED: Words(what="the process died of a signal", remedies=(_RESTART,)),
    Cause.DISK_FULL: Words(
        what="the disk is full",
        remedies=(
            (
                "`oomproof plan MODEL` says how much there is to download and what the disk has "
                "free; HF_HOME moves the cache"
            ),
        ),
    ),
    Cause.GPU_BUSY: Words(
        what="another process has the GPU to itself (exclusive mode, or MPS is full), or it is "
        "being reset",
        remedies=("wait and start again; `nvidia-smi` shows who has it",),
    ),
    Cause.GPU_TAKEN: Words(
        what="other processes hold memory that the engine was promised when it started",
        remedies=("end them (`nvidia-smi` lists them) or ask for a smaller share",),
        plans=True,
    ),
    Cause.SYSTEM_NOT_READY: Words(
        what="the driver is not ready yet; with NVSwitch that is the fabric manager",
        remedies=("`systemctl status nvidia-fabricmanager`; wait, then start again",),
    ),
    Cause.ILLEGAL_ACCESS: Words(
        what="a kernel read or wrote memory that is not its own; the process's CUDA context is "
        "gone",
        remedies=(
            _RESTART,
            "CUDA_LAUNCH_BLOCKING=1 makes the traceback name the operation that did it",
        ),
    ),
    Cause.DEVICE_ASSERT: Words(
        what="a kernel checked its input and refused, mostly an index beyond a table: a token id "
        "not in the vocabulary, or a position beyond the model's maximum. Every later CUDA call "
        "of the process fails too",
        remedies=(
            (
                "on the CPU the same input gives a plain IndexError; CUDA_LAUNCH_BLOCKING=1 "
                "names the line"
            ),
            _RESTART,
        ),
    ),
    Cause.LAUNCH_FAILURE: Words(
        what="a kernel failed while it ran; the process's CUDA context is gone",
        remedies=(_RESTART,),
    ),
    Cause.LAUNCH_TIMEOUT: Words(
        what="a kernel took longer than the driver lets it; the process's CUDA context is gone",
        remedies=(_RESTART, "a GPU that also drives a display has such a limit"),
    ),
    Cause.CONTEXT_LOST: Words(
        what="the process's CUDA context is gone or was never made", remedies=(_RESTART,)
    ),
    Cause.FORKED: Words(
        what="a process was forked after CUDA had been started in its parent",
        remedies=('multiprocessing.set_start_method("spawn"), before anything of CUDA',),
    ),
    Cause.LIBRARY: Words(
        what="cuBLAS or a library like it failed, and not for memory; often an earlier kernel "
        "had already gone wrong",
        remedies=("CUDA_LAUNCH_BLOCKING=1 names the operation that failed first", _RESTART),
    ),
    Cause.NCCL: Words(
        what="NCCL failed: GPUs or machines could not talk, or one of them had gone",
        remedies=(
            (
                "read the other ranks' logs: the one that failed first is the cause; "
                "NCCL_DEBUG=INFO says more"
            ),
        ),
    ),
    Cause.UNKNOWN_CUDA: Words(
        what="CUDA reports an error that says nothing more; the process's state is not to be "
        "trusted",
        remedies=(_RESTART, "`dmesg | grep NVRM` shows what the driver saw"),
    ),
    Cause.ECC: Words(
        what="the GPU's memory has an error that its ECC could not mend: the hardware's fault, "
        "not the program's",
        remedies=("nvidia-smi -q -d ECC,ROW_REMAPPER; reset the GPU, and replace it if it recurs",),
    ),
    Cause.NVLINK: Words(
        what="a link between GPUs failed: the hardware's fault, not the program's",
        remedies=("nvidia-smi nvlink -e shows the errors; reset the GPUs, check their seating",),
    ),
    Cause.GPU_LOST: Words(
        what="the GPU does not answer any more: it has fallen off the bus, or its firmware hangs",
        remedies=("reboot; if it recurs: power supply, cooling, seating, then the card itself",),
    ),
    Cause.ON_CHIP_MEMORY: Words(
        what="a kernel asks for more shared memory or registers than one of the GPU's processors "
        "has. That is no lack of GPU memory: smaller batches or fewer bits change nothing",
        remedies=(
            "use another kernel or a version made for this GPU (smaller blocks, fewer stages)",
        ),
    ),
    Cause.NO_KERNEL: Words(
        what="a library has no machine code for this GPU: it was built for other architectures",
        remedies=(
            _DOCTOR,
            "pip install --upgrade torch (and the library that the traceback names)",
        ),
    ),
    Cause.DRIVER: Words(
        what="the NVIDIA driver and the CUDA of the installed packages do not go together",
        remedies=(_DOCTOR, "update the driver, or install a torch built for an older CUDA"),
    ),
    Cause.NO_GPU: Words(
        what="no GPU of that number can be seen from this process",
        remedies=(
            _DOCTOR,
            "check nvidia-smi, CUDA_VISIBLE_DEVICES, and --gpus all of the container",
            'torch.load(..., map_location="cpu") where a file was saved on another GPU',
        ),
    ),
    Cause.CPU_BUILD: Words(
        what="the installed torch is a CPU build", remedies=(_DOCTOR, "pip install torch anew")
    ),
    Cause.BITSANDBYTES: Words(
        what="bitsandbytes could not load its CUDA library: none of its builds matches this "
        "CUDA, or one that it needs is not found",
        remedies=(
            _DOCTOR,
            "pip install --upgrade bitsandbytes",
            "python -m bitsandbytes says more",
        ),
    ),
    Cause.MISSING_PACKAGE: Words(
        what="a package that is needed is not installed, or too old",
        remedies=("pip install --upgrade 'oomproof[run]'", _DOCTOR),
    ),
    Cause.WRONG_DEVICE: Words(
        what="an operation got tensors of different devices or dtypes, as happens when part of a "
        "model was left on the CPU, or an input was not moved to the model's device",
        remedies=("inputs.to(model.device); `oomproof run` never splits a model over CPU and GPU",),
    ),
    Cause.BAD_INDEX: Words(
        what="an index lies beyond a table: a token id not in the vocabulary, or a position "
        "beyond the model's maximum",
        remedies=("use the tokenizer of the same model, and no longer a prompt than it takes",),
    ),
    Cause.CAPTURE: Words(
        what="something happened while a CUDA graph was recorded that must not: an allocation, a "
        "synchronization, or an error before",
        remedies=(
            "run without CUDA graphs (enforce_eager, no torch.compile) to see the first error",
        ),
    ),
    Cause.BAD_CALL: Words(
        what="CUDA was asked for something that it does not do; retrying changes nothing",
        remedies=("CUDA_LAUNCH_BLOCKING=1 names the operation",),
    ),
    Cause.BAD_REQUEST: Words(what="an option or a value cannot be served as asked"),
}

CLASSES: dict[FaultClass, str] = {
    FaultClass.SHRINK: "the process is sound: with less memory it can try again",
    FaultClass.WAIT: "wait, then try again in a fresh process",
    FaultClass.PROCESS: "fatal for the process: replace it, never retry in it",
    FaultClass.GPU: "fatal for the GPU: no process works there until it was looked at",
    FaultClass.USER: "no retry helps: something has to change first",
}
