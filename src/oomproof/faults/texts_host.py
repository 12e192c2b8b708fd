"""What the operating system and the processor's side say: memory, signals, disks."""

from __future__ import annotations

from collections.abc import Iterator

from oomproof.faults.fault import Cause, FaultClass
from oomproof.faults.rule import Rule, always, rule

_SHRINK, _PROCESS, _USER = FaultClass.SHRINK, FaultClass.PROCESS, FaultClass.USER


def host_rules() -> Iterator[Rule]:
    """Every rule of this file, the most particular words first."""
    yield from _shared_memory()
    yield from _memory()
    yield from _disk()
    yield from _killed()


def _memory() -> Iterator[Rule]:
    full = always(_SHRINK, Cause.HOST_MEMORY)
    yield rule(
        "torch on the processor",
        "DefaultCPUAllocator",
        r"(?:\[enforce fail at [^\]\n]{1,80}\] ?)?[^:\n]{0,160}?"
        r"DefaultCPUAllocator: (?:can't allocate|not enough) memory",
        full,
        bare=True,
    )
    yield rule(
        "mmap",
        "unable to mmap",
        r"unable to mmap [0-9]{1,19} bytes from file <[^>\n]{0,4096}>: Cannot allocate memory",
        full,
        bare=True,
    )
    yield rule(
        "errno 12",
        "Cannot allocate memory",
        r"\[Errno 12\] Cannot allocate memory",
        full,
        about_values=True,
    )
    yield rule(
        "paging file",
        "[WinError 1455]",
        r"\[WinError 1455\]",
        full,
        about_values=True,
    )
    yield rule("bad_alloc", "std::bad_alloc", r"std::bad_alloc\b", full, bare=r"std::bad_alloc\s*$")


def _shared_memory() -> Iterator[Rule]:
    full = always(_USER, Cause.SHARED_MEMORY_FILES)
    yield rule(
        "shared memory",
        "unable to write to file </torch_",
        r"unable to write to file </torch_[^>\n]{1,200}>: No space left on device",
        full,
        bare=True,
    )
    yield rule(
        "shared memory",
        "is killed by signal: Bus error",
        r"DataLoader worker \(pid\(?s?\)? [0-9, ]{1,80}\) is killed by signal: Bus error",
        full,
        bare=True,
    )


def _disk() -> Iterator[Rule]:
    full = always(_USER, Cause.DISK_FULL)
    yield rule(
        "errno 28",
        "No space left on device",
        r"(?:\[Errno 28\]|\[enforce fail[^\n]{0,200}) ?No space left on device",
        full,
        about_values=True,
    )
    yield rule("errno 122", "[Errno 122]", r"\[Errno 122\]", full, about_values=True)
    yield rule(
        "safetensors disk",
        "code: 28",
        r"Error while serializing: (?:\w{1,20}\()?I/?[oO]?\w{0,10}[^\n]{0,40}code: 28\b",
        full,
        about_values=True,
    )


def _killed() -> Iterator[Rule]:
    by_kernel = always(_PROCESS, Cause.KILLED_FOR_MEMORY)
    killed = always(_PROCESS, Cause.KILLED)
    yield rule(
        "kernel's killer",
        "illed process",
        r"(?!)",
        by_kernel,
        bare=r"(?:Memory cgroup out|Out) of memory: Killed process [0-9]{1,10}\b",
    )
    yield rule(
        "kernel's killer", "oom-kill:", r"(?!)", by_kernel, bare=r"oom-kill:constraint=CONSTRAINT_"
    )
    yield rule(
        "container",
        "OOMKilled",
        r"OOMKilled\b",
        by_kernel,
        bare=r"(?:[Rr]eason: {1,20})?OOMKilled\s*$",
    )
    yield rule("shell", "Killed", r"(?!)", killed, bare=r"Killed\s*$")
    yield rule(
        "shell",
        "Killed",
        r"(?!)",
        killed,
        bare=r"\S{1,300}: line [0-9]{1,6}: {1,8}[0-9]{1,10} Killed\b",
    )
    for words in ("code 137", "code: 137", "status 137"):
        yield rule(
            "exit code",
            words,
            rf"(?:\S{{1,80}} )?(?:exited|finished|terminated|failed|died) with (?:exit )?{words}\b",
            killed,
            bare=r"(?:Process |[Cc]ommand )?(?:\S{1,80} )?(?:exited|finished|terminated|failed) "
            rf"with (?:non-zero )?(?:exit )?{words}\b",
        )
    yield rule("exit code", ": -9", r"(?!)", killed, bare=r"exit ?code {0,8}: {0,2}-9\b")
    yield rule(
        "signal",
        "SIGKILL",
        r"[^\n]{0,300}\b(?:died with <Signals\.SIGKILL: 9>|Signal 9 \(SIGKILL\))",
        killed,
        bare=r"(?:Signal 9 \(SIGKILL\) received by PID|traceback {0,8}: Signal 9 \(SIGKILL\))",
    )
    yield rule(
        "worker",
        "is killed by signal: Killed",
        r"DataLoader worker \(pid\(?s?\)? [0-9, ]{1,80}\) is killed by signal: Killed",
        killed,
        bare=True,
    )
    yield rule(
        "worker",
        "process in the process pool was terminated",
        r"A process in the process pool was terminated abruptly",
        killed,
    )
    yield rule(
        "worker",
        "signal: killed",
        r"(?!)",
        killed,
        bare=r"llama runner process has terminated: signal: killed",
    )
