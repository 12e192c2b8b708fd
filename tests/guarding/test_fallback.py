"""What --fallback takes."""

from __future__ import annotations

import pytest

from oomproof.errors import InputError
from oomproof.guarding.fallback import read_fallback


def test_rungs_are_read_in_the_users_order() -> None:
    assert read_fallback(None) == ()
    assert read_fallback("context, kv8,meta-llama/Llama-3.2-1B,cpu") == (
        "context",
        "kv8",
        "meta-llama/Llama-3.2-1B",
        "cpu",
    )
    assert read_fallback(["batch", "format"]) == ("batch", "format")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("kv8,kv9", "'kv9' is no rung of the ladder: use kv8, context, batch, format, cpu, or"),
        ("", "'' is no rung"),
        ("kv8,,cpu", "'' is no rung"),
        ("kv8,context,kv8", "'kv8' is named twice"),
        ("cpu,kv8,batch", "'cpu' is followed by kv8, batch"),
        ("-o/x", "is no rung"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(asked: str, said: str) -> None:
    with pytest.raises(InputError) as refused:
        read_fallback(asked)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
