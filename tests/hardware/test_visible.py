from __future__ import annotations

import pytest

from oomproof.errors import HardwareError
from oomproof.hardware.visible import visible_ordinals

UUIDS = ("GPU-aaaa1111", "GPU-aaaa2222", "GPU-bbbb3333", "GPU-cccc4444")


@pytest.mark.parametrize(
    ("setting", "ordinals"),
    [
        (None, (0, 1, 2, 3)),
        ("", ()),
        (" ", ()),
        ("-1", ()),
        ("0", (0,)),
        ("2,0", (2, 0)),
        (" 3 , 1 ", (3, 1)),
        ("0,-1,1", (0,)),
        ("0,7,1", (0,)),
        ("0,banana,1", (0,)),
        ("0,,1", (0,)),
        ("NoDevFiles", ()),
        ("1,1", ()),
        ("0,1,2,3", (0, 1, 2, 3)),
        ("GPU-bbbb3333", (2,)),
        ("GPU-bbbb", (2,)),
        ("GPU-cccc,GPU-aaaa1", (3, 0)),
        ("GPU-bbbb,GPU-dddd,GPU-cccc", (2,)),
        ("GPU-aaaa", ()),
        ("GPU-bbbb,GPU-bbbb3333", ()),
        ("GPU-bbbb,0", (2, 0)),
        ("99999999999999999999", ()),
        ("٣", ()),
    ],
)
def test_entries_are_read_as_cuda_reads_them(
    setting: str | None, ordinals: tuple[int, ...]
) -> None:
    assert visible_ordinals(setting, UUIDS) == ordinals


def test_a_mig_slice_is_refused_with_a_way_on() -> None:
    with pytest.raises(HardwareError, match=r"MIG slice 'MIG-1234'.*--gpus"):
        visible_ordinals("MIG-1234", UUIDS)


def test_a_machine_without_gpus_shows_none() -> None:
    assert visible_ordinals(None, ()) == ()
    assert visible_ordinals("0", ()) == ()
