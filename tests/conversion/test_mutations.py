"""Headers with random mistakes: refused with the file named, or read as safetensors reads them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from oomproof.errors import OomproofError
from oomproof.quantization.handlers import handler
from tests.compat.checkpoints import random_checkpoint
from tests.conversion.jobs import quantized, tensors_of
from tests.conversion.test_damage import LONGEST_S, rewritten
from tests.engine.native.test_stored import engine_of, parts_of

FORMAT = "nf4"
_JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**53,
        2**64,
        1.5,
        "",
        "F32",
        "U8",
        "x" * 300,
        [],
        {},
        [0],
        [1, 2],
    ]
)


def mutate(header: dict[str, Any], data: st.DataObject) -> None:
    """One change to a header, mostly of a kind that a reader must find."""
    names = [name for name, entry in header.items() if _is_whole(entry)]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    kind = data.draw(
        st.sampled_from(["drop", "rename", "swap", "dtype", "shape", "offsets", "field", "entry"])
    )
    entry = header[name]
    if kind == "drop":
        header.pop(name)
    elif kind == "rename":
        header[data.draw(st.text(max_size=20))] = header.pop(name)
    elif kind == "swap":
        other = data.draw(st.sampled_from(names))
        header[name], header[other] = header[other], header[name]
    elif kind == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["F32", "BF16", "F16", "U8", "I8", "F64", "Q4"]))
    elif kind == "shape":
        shape = entry["shape"]
        shape = data.draw(
            st.sampled_from([shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [-1], [0]])
        )
        entry["shape"] = shape
    elif kind == "offsets":
        index = data.draw(st.integers(0, 1))
        entry["data_offsets"][index] += data.draw(st.integers(-300, 300))
    elif kind == "field":
        entry[data.draw(st.sampled_from([*entry, "more"]))] = data.draw(_JUNK)
    else:
        header[name] = data.draw(_JUNK)


def _is_whole(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(one) is int for one in offsets)
    )


class Bench:
    """A folder whose one file is changed and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "model.safetensors"
        self.raw = self.path.read_bytes()
        self.out = folder.with_name("out")
        self.names = self.read()
        self.read_right = 0
        """Changes that did no harm."""

    def check(self, data: st.DataObject) -> None:
        """Refused in one error of ours that names the file, or read as safetensors reads it."""
        self.path.write_bytes(self.raw)
        changes = data.draw(st.integers(1, 3))

        def edit(header: dict[str, Any]) -> None:
            for _ in range(changes):
                mutate(header, data)

        rewritten(self.path, edit)
        # Of this process: the machine may be busy with others.
        begin_s = time.process_time()
        names, refusal = self.attempt()
        assert time.process_time() - begin_s < LONGEST_S
        if names is None:
            assert str(self.folder) in refusal or "model.safetensors" in refusal
            assert "\n" not in refusal
            assert not self.out.exists()
        else:
            assert names == self.names
            self.read_right += 1

    def attempt(self) -> tuple[set[str] | None, str]:
        """What came out, or how it was refused."""
        try:
            return self.read(), ""
        except OomproofError as error:
            return None, str(error)

    def read(self) -> set[str]:
        """The whole of it is read, and compared: what came out.

        Raises:
            OomproofError: It is refused.
        """
        raise NotImplementedError


class Quantizes(Bench):
    """A checkpoint in 16 bits, for `quantize`."""

    def read(self) -> set[str]:
        shutil.rmtree(self.out, ignore_errors=True)
        quantized(self.out, self.folder, format=FORMAT, search=False)
        found, stored = tensors_of(self.out), load_file(self.path)
        held = handler(FORMAT)
        for name, tensor in stored.items():
            values = tensor.to(torch.bfloat16)
            if not name.endswith("_proj.weight"):
                assert torch.equal(found[name], values), name
                continue
            for part, expected in held.encode(values).items():
                own = found[name if part == "weight" else f"{name}.{part}"]
                assert torch.equal(own.view(-1), expected.view(-1)), (name, part)
        return set(found)


class Loads(Bench):
    """A checkpoint in 4 bits, for the native engine."""

    def read(self) -> set[str]:
        _, engine = engine_of(self.folder)
        found, stored = parts_of(engine), load_file(self.path)
        for name, values in found.items():
            weight, _, part = name.rpartition(".")
            own = stored.get(name, stored[weight] if part == "weight" else None)
            assert own is not None, name
            assert torch.equal(values.reshape(-1), own.to(values.dtype).reshape(-1)), name
        engine.close()
        return set(found)


@pytest.fixture(scope="module", params=["quantize", "load"])
def bench(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    source = random_checkpoint(folder / "copy", hidden_size=64, num_hidden_layers=2, vocab_size=512)
    if request.param == "quantize":
        return Quantizes(source)
    four_bits = quantized(folder / "four", source, format=FORMAT)
    (four_bits / "oomproof-manifest.json").unlink()
    return Loads(four_bits)


_RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=_RELAXED)
@given(data=st.data())
def test_mutated_headers_are_refused_or_read_right(bench: Bench, data: st.DataObject) -> None:
    bench.check(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@hypothesis_settings(max_examples=5000, deadline=None, suppress_health_check=_RELAXED)
@given(data=st.data())
def test_10_000_mutated_headers_are_refused_or_read_right(
    bench: Bench, data: st.DataObject
) -> None:
    bench.check(data)
