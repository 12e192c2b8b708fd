"""Tokens of a whole file on the disk, so that memory is bounded and a resumed run reads them back.

Three files of plain numbers: `tokens.bin` (uint32), `learned.bin` (uint8, one a token) and
`samples.bin` (int64 pairs: where a sample ends, and its line); `cache.json` is written last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from oomproof.conversion.files import explained, sync_folder, write_whole
from oomproof.errors import InputError
from oomproof.tuning.encode import Sample, SampleEncoder, TrainingTokenizer
from oomproof.tuning.options import LongSamples
from oomproof.tuning.records import DataError, read_records

VERSION = 1
META_FILE = "cache.json"
MAX_SAMPLES = 1 << 28
_FLUSH_TOKENS = 1 << 20
_CHUNK_BYTES = 1 << 22

Told = Callable[[int, int], None]
"""Called with bytes of the data read, and in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """What a file of training data holds."""

    name: str
    sha256: str
    size_bytes: int
    context: int
    samples: int
    tokens: int
    learned_tokens: int
    longest: int
    """Tokens of the longest sample that is kept."""
    longest_line: int
    truncated: int
    dropped: int


class TokenCache:
    """Samples of a cache, mapped into memory.

    Args:
        folder: Where `build_cache` wrote it.
        facts: What it holds.
    """

    def __init__(self, folder: Path, facts: DataFacts) -> None:
        self.facts = facts
        self._tokens: npt.NDArray[np.uint32] = np.memmap(folder / "tokens.bin", np.uint32, "r")
        self._learned: npt.NDArray[np.uint8] = np.memmap(folder / "learned.bin", np.uint8, "r")
        table = np.fromfile(folder / "samples.bin", np.int64).reshape(-1, 2)
        self.ends: npt.NDArray[np.int64] = table[:, 0].copy()
        """Where each sample ends."""
        self.lines: npt.NDArray[np.int64] = table[:, 1].copy()
        """The line of the data that each comes from."""
        self.lengths: npt.NDArray[np.int64] = np.diff(self.ends, prepend=0)
        """Tokens of each sample."""

    def __len__(self) -> int:
        return len(self.ends)

    def sample(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens of a sample, and which of them are learned."""
        end = int(self.ends[number])
        begin = end - int(self.lengths[number])
        return (
            np.asarray(self._tokens[begin:end], dtype=np.int64),
            np.asarray(self._learned[begin:end], dtype=np.bool_),
        )


def digest_of_data(path: Path, told: Told | None = None) -> tuple[str, int]:
    """SHA-256 and size of a file.

    Raises:
        InputError: It cannot be read.
    """
    digest, done = hashlib.sha256(), 0
    try:
        total = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if told is not None:
                    told(done, total)
    except OSError as error:
        raise InputError(f"data {path} cannot be read ({error.strerror or error})") from None
    return digest.hexdigest(), done


def open_cache(folder: Path, key: str) -> TokenCache | None:
    """The cache of that key; None where there is none, or it is not whole."""
    try:
        meta = json.loads((folder / META_FILE).read_bytes())
        if meta["version"] != VERSION or meta["key"] != key:
            return None
        facts = DataFacts(**meta["facts"])
        sizes = {
            "tokens.bin": 4 * facts.tokens,
            "learned.bin": facts.tokens,
            "samples.bin": 16 * facts.samples,
        }
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenCache(folder, facts)


def cache_key(sha256: str, tokenizer_digest: str, context: int, long_samples: LongSamples) -> str:
    """Digest of all that the cache depends on."""
    parts = (str(VERSION), sha256, tokenizer_digest, str(context), long_samples)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def build_cache(
    path: Path,
    tokenizer: TrainingTokenizer,
    folder: Path,
    *,
    key: str,
    sha256: str,
    context: int,
    long_samples: LongSamples,
    told: Told | None = None,
) -> TokenCache:
    """Reads a file through and writes its tokens, a block at a time.

    Args:
        path: The data.
        tokenizer: The model's.
        folder: The folder to make.
        key: Of `cache_key`.
        sha256: Of the data.
        context: Tokens of a sequence.
        long_samples: What becomes of samples that are longer: "refuse", "truncate" or "drop".
        told: Told of bytes read.

    Raises:
        DataError: A line that cannot be used, or samples that are too long and are refused.
        CheckpointError: The disk is full.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    writer = _Writer(part, context, long_samples, str(path))
    total = path.stat().st_size
    encoder = SampleEncoder(tokenizer, context=context, name=str(path))
    with explained(part):
        part.mkdir(parents=True)
        with writer:
            for record, done in read_records(path):
                for sample in encoder.encode(record):
                    writer.add(sample)
                if told is not None:
                    told(done, total)
            for sample in encoder.finish():
                writer.add(sample)
    facts = writer.facts(sha256=sha256, size_bytes=total)
    with explained(part):
        meta = {"version": VERSION, "key": key, "facts": asdict(facts)}
        write_whole(part / META_FILE, json.dumps(meta, indent=2).encode())
        sync_folder(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        sync_folder(folder.parent)
    return TokenCache(folder, facts)


class _Writer:
    def __init__(self, folder: Path, context: int, long_samples: LongSamples, name: str) -> None:
        self._folder, self._context, self._long, self._name = folder, context, long_samples, name
        self._files: dict[str, IO[bytes]] = {}
        self._tokens, self._learned, self._table = array("I"), bytearray(), array("q")
        self._samples = self._end = self._learned_count = 0
        self._seen = self._too_long = self._dropped = 0
        self._longest, self._longest_line = 0, 0
        self._longest_seen, self._longest_seen_line, self._first_long = 0, 0, (0, 0)

    def __enter__(self) -> Self:
        for name in ("tokens", "learned", "samples"):
            self._files[name] = (self._folder / f"{name}.bin").open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        for file in self._files.values():
            file.close()

    def add(self, sample: Sample) -> None:
        self._seen += 1
        tokens, learned, length = sample.tokens, sample.learned, len(sample.tokens)
        if length > self._longest_seen:
            self._longest_seen, self._longest_seen_line = length, sample.line
        if length > self._context:
            if not self._too_long:
                self._first_long = (sample.line, length)
            self._too_long += 1
            if self._long != "truncate" or not any(learned[1 : self._context]):
                self._dropped += 1
                return
            tokens, learned = tokens[: self._context], learned[: self._context]
            length = self._context
        if self._samples >= MAX_SAMPLES:
            raise DataError(self._name, sample.line, f"is beyond {MAX_SAMPLES:,} samples")
        self._tokens.extend(tokens)
        kept = bytes((False, *learned[1:]))
        self._learned += kept
        self._learned_count += sum(kept)
        self._samples += 1
        self._end += length
        self._table.extend((self._end, sample.line))
        if length > self._longest:
            self._longest, self._longest_line = length, sample.line
        if len(self._tokens) >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        self._tokens.tofile(self._files["tokens"])
        self._files["learned"].write(self._learned)
        self._table.tofile(self._files["samples"])
        self._tokens, self._learned, self._table = array("I"), bytearray(), array("q")

    def facts(self, *, sha256: str, size_bytes: int) -> DataFacts:
        if self._too_long and self._long == "refuse":
            line, length = self._first_long
            raise DataError(
                self._name,
                line,
                f"has {length:,} tokens, a sequence {self._context:,}; of {self._seen:,} samples "
                f"{self._too_long:,} are longer, the longest with {self._longest_seen:,} "
                f"(line {self._longest_seen_line:,})",
                remedy=f"use --context {self._longest_seen}, or --long-samples truncate or drop",
            )
        if not self._samples:
            raise DataError(
                self._name,
                None,
                f"all {self._seen:,} samples are longer than {self._context:,} tokens",
                remedy=f"use --context {self._longest_seen}",
            )
        return DataFacts(
            name=Path(self._name).name,
            sha256=sha256,
            size_bytes=size_bytes,
            context=self._context,
            samples=self._samples,
            tokens=self._end,
            learned_tokens=self._learned_count,
            longest=self._longest,
            longest_line=self._longest_line,
            truncated=self._too_long - self._dropped,
            dropped=self._dropped,
        )
