"""Training data is read strictly: every mistake names its line, and nothing is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oomproof.errors import InputError
from oomproof.tuning import records
from oomproof.tuning.records import Completion, Conversation, DataError, Page, Text, read_records
from tests.tuning.books import write_lines

GOOD = {"text": "a b"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(path: Path) -> list[Any]:
    return [record for record, _ in read_records(path)]


def test_each_form_is_read_with_its_line(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"messages": TURNS},
        "",
        {"prompt": "", "completion": "c", "id": 7},
        {"text": "d"},
    )
    conversation, completion, text = read(path)
    assert isinstance(conversation, Conversation)
    assert conversation.messages == tuple(TURNS)
    assert completion == Completion(line=3, prompt="", completion="c")
    assert text == Text(line=4, text="d")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    assert read(tmp_path / "a.jsonl") == [Text(line=1, text="a")]
    assert read(tmp_path / "a.txt") == [Page(line=1, text="a\n")]


def test_plain_text_comes_in_blocks_that_end_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "TEXT_BLOCK_BYTES", 10)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\nfive", encoding="utf-8")
    assert read(tmp_path / "a.txt") == [
        Page(line=1, text="one\ntwo\nthree\n"),
        Page(line=4, text="four\nfive"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "is not JSON at column 13"),
        ("nonsense", "is not JSON at column 1"),
        ('{"text": NaN}', "NaN is no JSON value"),
        ("[" * 100_000, "is not JSON"),
        ('["a"]', "is a JSON list, not an object"),
        ("3", "is a JSON number, not an object"),
        ("{}", "has none of messages, prompt and completion, or text"),
        ({"conversations": []}, "rename conversations to messages"),
        ({"instruction": "a", "output": "b"}, "rename instruction to prompt"),
        ({"text": "a", "messages": TURNS}, "has both messages and text"),
        ({"text": 3}, "text is a JSON number, not a string"),
        ({"text": "  "}, "text is empty"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ({"prompt": "a"}, "has no completion"),
        ({"completion": "a"}, "has completion without prompt"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": ["a"], "completion": "b"}, "prompt is a JSON list, not a string"),
        ({"messages": "a"}, "messages is a JSON string, not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["a"]}, "message 1 is a JSON string, not an object"),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        ({"messages": [{"role": "human", "content": "a"}]}, "has role 'human': use one of"),
        ({"messages": [{"role": "user", "content": [1]}]}, "content that is a JSON list"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1 is empty (user)"),
        ({"messages": TURNS[1:]}, "message 1 is from assistant at the beginning: user comes"),
        ({"messages": TURNS[:1]}, "messages end with user: there is no answer to learn"),
        ({"messages": [*TURNS[:1], *TURNS]}, "message 2 is from user after user"),
        (
            {"messages": [*TURNS, {"role": "system", "content": "a"}]},
            "message 3 is from system, which only the first may be",
        ),
        ({"messages": TURNS, "tools": 3}, "tools is not a list of objects"),
    ],
)
def test_a_bad_line_is_named(line: Any, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.line == 3
    assert f"{path}, line 3: " in str(caught.value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_bytes_that_are_not_utf_8_are_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: byte 11 is not UTF-8"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(suffix: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"holds no (samples|text)"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_huge_line_is_refused_before_it_is_read(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 20)
    path = tmp_path / f"data{suffix}"
    path.write_text('{"text": "a"}\n' + "x" * 1000, encoding="utf-8")
    with pytest.raises(DataError, match="line 2: is longer than 20 B"):
        read(path)


def test_other_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "b.csv").write_text("a,b", encoding="utf-8")
    (tmp_path / "c.jsonl").mkdir()
    for name, message in (
        ("a.parquet", "is Parquet, which is not read: write it as JSON lines"),
        ("b.csv", "has no suffix that tells what it is"),
        ("c.jsonl", "is a folder"),
        ("d.jsonl", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path / name)
