"""Names of what is compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from oomproof.errors import InputError
from oomproof.evaluation.variants import COMPARED, Asked, Variant, plain, read_names
from oomproof.formats import SEARCHED_FORMATS, get_format, mixture


def test_every_format_and_every_searched_one_has_a_name() -> None:
    for name in COMPARED:
        assert read_names(name) == [Asked(name=name, format=name)]
    for name in SEARCHED_FORMATS:
        found = read_names([f"{name}+search"])
        assert found == [Asked(name=f"{name}+search", format=name, search=True)]


def test_a_mixture_is_a_plans_or_one_of_so_many_bytes() -> None:
    assert read_names("fit, fit:40MiB,fit:12345") == [
        Asked(name="fit", format="fit", search=True),
        Asked(name="fit:40MiB", format="fit", search=True, budget_bytes=40 << 20),
        Asked(name="fit:12345", format="fit", search=True, budget_bytes=12345),
    ]


def test_what_has_a_slash_is_a_folder_and_one_of_its_kind_keeps_its_path() -> None:
    assert read_names("a/one,./two/") == [
        Asked(name="one/", folder=Path("a/one")),
        Asked(name="two/", folder=Path("two")),
    ]
    assert [one.name for one in read_names("a/one,b/one")] == ["a/one", "b/one"]


def test_a_name_that_comes_twice_is_compared_once() -> None:
    assert [one.name for one in read_names("nf4,int8,nf4")] == ["nf4", "int8"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("", "formats lists none"),
        ("nf5", "unknown format 'nf5'"),
        ("NF4", "unknown format 'NF4'"),
        ("nf4+seach", r"unknown format 'nf4\+seach': use some of nf4\+search"),
        ("nf4+", r"unknown format 'nf4\+'"),
        ("int8+search", r"unknown format 'int8\+search'"),
        ("fit+search", r"unknown format 'fit\+search'"),
        ("nf4:4MiB", "only fit takes a number of bytes"),
        ("fit:", "'fit:': size '' is not a size"),
        ("fit:much", "size 'much' is not a size"),
        ("fit:0", "must be more than 0"),
        ([f"fit:{size}" for size in range(1, 66)], "formats lists 65, 64 are the most"),
    ],
)
def test_what_is_no_name_is_one_clear_error(names: str | list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_names(names)


def test_a_folder_without_a_slash_is_told_how_to_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r'unknown format .mine.: for the folder write "\./mine"'):
        read_names("mine")


def test_only_a_format_without_a_search_is_plain() -> None:
    assert plain("nf4").is_plain
    assert not Variant(name="x", format=get_format("nf4"), search=True).is_plain
    assert not Variant(name="x", format=mixture({"a": "nf4"})).is_plain
