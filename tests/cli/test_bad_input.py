"""Every input a user can get wrong gets one clear line and its exit code, and nothing is loaded."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oomproof.cli.main import main
from oomproof.models.resolve import bundled_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(bundled_folder(), tmp_path / "model"))


@pytest.fixture
def oomproof(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["oomproof", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


def _edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _header(folder: Path) -> tuple[dict[str, Any], bytes]:
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(folder: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _index_a_missing_shard(folder: Path) -> None:
    header, _ = _header(folder)
    names = [name for name in header if name != "__metadata__"]
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map[names[0]] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_a_path_outside(folder: Path) -> None:
    header, _ = _header(folder)
    names = [name for name in header if name != "__metadata__"]
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _claim_a_header_of_100_mb(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(200_000_000)


def _drop_a_tensor(folder: Path) -> None:
    header, data = _header(folder)
    last = max((name for name in header if name != "__metadata__"), key=lambda n: _begin(header[n]))
    kept = data[: _begin(header.pop(last))]
    _write(folder, header, kept)


def _begin(entry: dict[str, Any]) -> int:
    return int(entry["data_offsets"][0])


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{ this is no JSON")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a truncated shard": (_truncate, "model.safetensors"),
    "a shard that the index names and the folder lacks": (
        _index_a_missing_shard,
        "model-00002-of-00002.safetensors",
    ),
    "a shard path that leaves the folder": (_index_a_path_outside, "../outside.safetensors"),
    "a header of 100 MB": (_claim_a_header_of_100_mb, "model.safetensors"),
    "a tensor that config.json describes and the weights lack": (_drop_a_tensor, "model"),
    "a config that is no JSON": (_no_json, "config.json"),
    "no config": (_no_config, "config.json"),
    "-1 layers": (lambda f: _edit_config(f, num_hidden_layers=-1), "num_hidden_layers"),
    "10^9 layers": (lambda f: _edit_config(f, num_hidden_layers=10**9), "num_hidden_layers"),
    "two layers too many": (lambda f: _edit_config(f, num_hidden_layers=7), "layers.5"),
    "heads that do not divide": (
        lambda f: _edit_config(f, num_attention_heads=7, head_dim=None),
        "config.json",
    ),
    "an unknown architecture": (
        lambda f: _edit_config(f, architectures=["NopeForCausalLM"]),
        "NopeForCausalLM",
    ),
}


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_gets_one_line_that_names_the_fault(
    damage: str, command: str, folder: Path, oomproof: Callable[..., tuple[int, str, str]]
) -> None:
    break_it, named = DAMAGE[damage]
    break_it(folder)
    prompt = ["hello"] if command == "run" else []
    code, out, err = oomproof(command, str(folder), *prompt)
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plan", "/no/such/folder"], "no such folder"),
        (["plan", "lama-3.1-8b"], "did you mean llama-3.1-8b"),
        (["plan", "tiny", "--format", "nf5"], "nf4-dq"),
        (["plan", "tiny", "--kv-format", "q2"], "fp8"),
        (["plan", "tiny", "--gpus", "3x RTX 9999"], "RTX 9999"),
        (["plan", "tiny", "--gpus", "0x24GiB"], "0"),
        (["plan", "tiny", "--context", "many"], "'many'"),
        (["plan", "tiny", "--context", "9999999"], "1,024"),
        (["plan", "tiny", "--concurrency", "0"], "concurrency 0"),
        (["plan", "tiny", "--max-memory", "9=1GiB"], "device 9"),
        (["plan", "tiny", "--max-memory", "1GiB"], "INDEX=SIZE"),
        (["plan", "tiny", "--reserve", "9" * 400 + "GiB"], "reserve"),
        (["plan", "tiny", "--cap", "-3GiB"], "cap"),
        (["plan", "tiny", "--engine", "warp"], "warp"),
        (["run", "tiny", "   "], "prompt is empty"),
        (["run", "tiny", "hi", "--temperature", "-1"], "temperature"),
        (["run", "tiny", "hi", "--top-p", "0"], "top-p"),
        (["run", "tiny", "hi", "--seed", "-4"], "seed"),
    ],
)
def test_a_wrong_argument_gets_one_line_that_names_it(
    arguments: list[str], named: str, oomproof: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = oomproof(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


def test_an_unknown_option_is_exit_code_2(oomproof: Callable[..., tuple[int, str, str]]) -> None:
    assert oomproof("plan", "tiny", "--bogus")[0] == 2
    assert oomproof("bogus")[0] == 2


def test_what_does_not_fit_is_exit_code_3(oomproof: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = oomproof("plan", "llama-3.1-405b", "--gpus", "1x24GiB", "--json")
    assert code == 3
    assert json.loads(out)["shortfall_bytes"] > 0
    code, out, err = oomproof("run", "tiny", "hello", "--cap", "1MiB")
    assert (code, out) == (3, "")
    assert "does not fit" in err


def test_a_value_that_is_not_finite_is_found_while_loading(
    folder: Path, oomproof: Callable[..., tuple[int, str, str]]
) -> None:
    header, data = _header(folder)
    begin = _begin(header["model.layers.3.mlp.up_proj.weight"])
    _write(folder, header, data[:begin] + b"\xc0\x7f" + data[begin + 2 :])
    for weight_format in ("bf16", "nf4-dq"):
        code, out, err = oomproof("run", str(folder), "hello", "--format", weight_format)
        assert (code, out) == (1, "")
        assert "'model.layers.3.mlp.up_proj.weight' holds a value that is not finite" in err
        assert "Traceback" not in err


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    oomproof: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = oomproof("run", "tiny", "word " * 600, "--context", "256")
    assert code == 1
    assert "planned context of 256" in err


def test_plan_prints_json_and_nothing_else_on_stdout(
    oomproof: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = oomproof("plan", "tiny", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["model"] == "tiny"


def test_run_answers_as_json_and_reads_a_prompt_from_stdin(
    oomproof: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    class Stdin(io.TextIOWrapper):
        def isatty(self) -> bool:
            return False

    monkeypatch.setattr("sys.stdin", Stdin(io.BytesIO(b"It was a dark night")))
    code, out, _ = oomproof("run", "tiny", "--json", "--seed", "1", "--max-new-tokens", "5")
    answer = json.loads(out)
    assert code == 0
    assert answer["new_tokens"] <= 5
    assert answer["memory"][0]["predicted"]["weights"] > 0


def test_chat_keeps_the_conversation_and_answers_its_commands(
    oomproof: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    lines = "/help\nWho goes there?\n/bogus\nAnd then?\n/memory\n/clear\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code, out, err = oomproof("chat", "tiny", "--seed", "1", "--max-new-tokens", "8")
    assert code == 0
    assert len(out.splitlines()) >= 2
    for said in ("/clear", "no command /bogus", "memory of 0 ", "forgotten"):
        assert said in err
    assert "Traceback" not in err
