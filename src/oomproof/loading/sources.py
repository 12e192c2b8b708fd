"""Where bytes come from: threads that read a checkpoint's files, in order, into bounded memory.

Reading is plain `preadv` into memory that is there already. Files are not mapped: each page of a
mapping costs a fault, and counts as this process's memory.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO

import torch

from oomproof.errors import CheckpointError
from oomproof.loading.slices import Part, Piece

MAX_THREADS = 8
"""One core copies about 6 GB/s out of the page cache, a PCIe 5 link takes about 55; more than eight
wait for each other (benchmarks/LOG.md)."""


def default_threads() -> int:
    """The cores that this process may use, at most MAX_THREADS."""
    if hasattr(os, "sched_getaffinity"):
        return min(MAX_THREADS, len(os.sched_getaffinity(0)))
    return min(MAX_THREADS, os.cpu_count() or 1)


class Buffer:
    """Host memory that a piece is read into, and the copy that must end before the next is."""

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.memory = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.view = view_bytes(self.memory)
        self._copied: torch.cuda.Event | None = None
        self._events: dict[torch.device, torch.cuda.Event] = {}

    def sent(self, stream: torch.cuda.Stream) -> None:
        """Notes that what the stream has to do now includes a copy of this buffer."""
        event = self._events.get(stream.device)
        if event is None:
            # A thread that spins while it waits would take a core from those that read.
            event = torch.cuda.Event(blocking=True)
            self._events[stream.device] = event
        event.record(stream)
        self._copied = event

    def wait(self) -> None:
        """Returns when the memory may be written to."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


class Buffers:
    """A bounded number of equal buffers, each made when it is first needed.

    Args:
        size_bytes: Of each.
        limit: The most that there may be.
        pinned: Whether they are page-locked, for copies to a GPU that do not block.
    """

    def __init__(self, *, size_bytes: int, limit: int, pinned: bool) -> None:
        self.pinned = pinned
        self._size_bytes = size_bytes
        self._limit = limit
        self._made = 0
        self._free: SimpleQueue[Buffer | None] = SimpleQueue()

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory of the buffers made so far."""
        return self._made * self._size_bytes if self.pinned else 0

    def reserve(self) -> Buffer | None:
        """A free buffer, None where one may be made; waits until either is so. One at a time.

        Raises:
            Stopped: There will be none.
        """
        try:
            buffer = self._free.get_nowait()
        except Empty:
            if self._made < self._limit:
                self._made += 1
                return None
            buffer = self._free.get()
        if buffer is None:
            raise Stopped
        return buffer

    def make(self) -> Buffer:
        """The buffer that `reserve` allowed."""
        return Buffer(self._size_bytes, pinned=self.pinned)

    def give_back(self, buffer: Buffer) -> None:
        """Makes a buffer free; what it still waits for, its next user will."""
        self._free.put(buffer)

    def stop(self) -> None:
        """Wakes whoever waits for a buffer."""
        self._free.put(None)

    def close(self) -> None:
        """Lets go of every buffer; nobody may be using one."""
        self._free = SimpleQueue()


class Stopped(Exception):  # noqa: N818 - no error: loading ended before everything was read
    """Nothing more is to be read."""


class Files:
    """The shards of a checkpoint, each open from its first piece to its last."""

    def __init__(self, folder: Path, pieces: Sequence[Piece]) -> None:
        self._folder = folder
        self._left = Counter(piece.parts[0].source.file for piece in pieces)
        self._open: dict[str, BinaryIO] = {}
        self._lock = threading.Lock()

    def read(self, parts: Sequence[Part], views: Sequence[memoryview]) -> None:
        """Fills each view with the part of the same index; the parts follow each other in a file.

        Raises:
            CheckpointError: The file cannot be read, or ends too early.
        """
        path = self._folder / parts[0].source.file
        try:
            self._fill(self._file(path), parts, views)
        except OSError as error:
            raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
        self._leave(path.name)

    def close(self) -> None:
        """Closes what is still open; nobody may be reading."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _fill(self, file: BinaryIO, parts: Sequence[Part], views: Sequence[memoryview]) -> None:
        left, index = list(views), 0
        offset = parts[0].file_bytes
        while index < len(left):
            count = self._read_at(file, left[index:], offset)
            if not count:
                raise CheckpointError(
                    str(self._folder / parts[index].source.file),
                    f"ends inside tensor {parts[index].source.name!r}",
                    remedy="the file changed since it was planned; download it again",
                )
            offset += count
            while index < len(left) and count >= len(left[index]):
                count -= len(left[index])
                index += 1
            if count:
                left[index] = left[index][count:]

    def _read_at(self, file: BinaryIO, views: list[memoryview], offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file.fileno(), views, offset)
        with self._lock:  # systems without it have one position for all threads
            file.seek(offset)
            return file.readinto(views[0])  # type: ignore[attr-defined, no-any-return]

    def _file(self, path: Path) -> BinaryIO:
        with self._lock:
            file = self._open.get(path.name)
            if file is None:
                file = self._open[path.name] = path.open("rb", buffering=0)
                if hasattr(os, "posix_fadvise"):  # twice the read-ahead
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return file

    def _leave(self, name: str) -> None:
        with self._lock:
            self._left[name] -= 1
            if not self._left[name]:
                self._open.pop(name).close()


@contextmanager
def reading(
    folder: Path, pieces: Sequence[Piece], buffers: Buffers, *, threads: int
) -> Iterator[Iterator[tuple[Piece, Buffer | None]]]:
    """The pieces in order, each once it is read, with the buffer that holds it.

    The buffer is to be given back. A piece without one is in its final place. When the block ends,
    however it ends, the threads have ended and the files are closed.

    Raises:
        CheckpointError: A file cannot be read, or ends too early.
    """
    readers = _Readers(folder, pieces, buffers)
    workers = [
        threading.Thread(target=readers.work, name=f"oomproof-read-{index}", daemon=True)
        for index in range(max(1, min(threads, len(pieces))))
    ]
    try:
        for worker in workers:
            worker.start()
        yield readers.in_order()
    finally:
        readers.stop()
        for worker in workers:
            # An interrupt may have come while one was starting, or before.
            with suppress(RuntimeError):
                worker.join()
        readers.files.close()


class _Readers:
    """What the threads share.

    A thread takes a buffer before it takes a piece, and both under one lock: so the first piece
    that is not read yet always has a thread and a buffer, and waiting for it cannot last for ever.
    """

    def __init__(self, folder: Path, pieces: Sequence[Piece], buffers: Buffers) -> None:
        self.files = Files(folder, pieces)
        self._pieces = pieces
        self._buffers = buffers
        self._next = 0
        self._stopped = False
        self._lock = threading.Lock()
        self._done: SimpleQueue[tuple[int, Buffer | None] | Exception] = SimpleQueue()

    def work(self) -> None:
        """Reads pieces until there are no more."""
        try:
            while True:
                self._done.put(self._read_next())
        except Stopped:
            return
        except Exception as error:  # noqa: BLE001 - raised again by the thread that loads
            self._done.put(error)

    def in_order(self) -> Iterator[tuple[Piece, Buffer | None]]:
        """The pieces as they were given."""
        early: dict[int, Buffer | None] = {}
        for number, piece in enumerate(self._pieces):
            while number not in early:
                done = self._done.get()
                if isinstance(done, Exception):
                    raise done
                early[done[0]] = done[1]
            yield piece, early.pop(number)

    def stop(self) -> None:
        """Lets every thread end after the read that it is in."""
        self._stopped = True
        self._buffers.stop()

    def _read_next(self) -> tuple[int, Buffer | None]:
        with self._lock:
            number = self._next
            if self._stopped or number == len(self._pieces):
                raise Stopped
            piece = self._pieces[number]
            buffer = self._buffers.reserve() if piece.is_buffered else None
            self._next += 1
        if not piece.is_buffered:
            self.files.read(piece.parts, _views_of_place(piece))
            return number, None
        if buffer is None:
            buffer = self._buffers.make()
        buffer.wait()
        self.files.read(piece.parts, _views_of_buffer(piece, buffer))
        return number, buffer


def _views_of_buffer(piece: Piece, buffer: Buffer) -> list[memoryview]:
    begins = [part.batch_bytes - piece.begin_bytes for part in piece.parts]
    return [
        buffer.view[begin : begin + part.size_bytes]
        for begin, part in zip(begins, piece.parts, strict=True)
    ]


def _views_of_place(piece: Piece) -> list[memoryview]:
    (one,) = piece.batch.slices
    place = one.pair.place
    if place is None:
        raise ValueError(f"{one.pair.target.name} has no place to be read into")
    whole = view_bytes(flat_bytes(place))
    begins = [one.begin_bytes + part.batch_bytes for part in piece.parts]
    return [
        whole[begin : begin + part.size_bytes]
        for begin, part in zip(begins, piece.parts, strict=True)
    ]


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory, uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)


def view_bytes(memory: torch.Tensor) -> memoryview:
    """The same memory, uint8 on the CPU, as Python's reads take it."""
    return memoryview(memory.numpy())  # type: ignore[arg-type]
