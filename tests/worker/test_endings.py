from __future__ import annotations

import pytest

from oomproof.worker.endings import describe_end


@pytest.mark.parametrize(
    ("returncode", "kills", "said"),
    [
        (-9, (2, 3), "ended by SIGKILL while answering: the kernel ended it for want of host mem"),
        (-9, (2, 2), "somebody sent the signal"),
        (-9, (None, None), "often that is the kernel's"),
        (-11, (0, 0), "ended by SIGSEGV while answering: its last words: Fatal Python error"),
        (-63, (0, 0), "ended by signal 63|ended by SIGRTMAX"),
        (3, (0, 0), "exited with code 3 while answering: its last words: Fatal Python error"),
    ],
)
def test_the_end_of_a_process_is_told_with_its_cause(
    returncode: int, kills: tuple[int | None, int | None], said: str
) -> None:
    error = describe_end(
        returncode, doing="answering", oom_kills=kills, stderr="noise\nFatal Python error\n\n"
    )
    with pytest.raises(type(error), match=said):
        raise error
    assert (error.signal is None) == (returncode > 0)
    assert error.code == (returncode if returncode > 0 else None)


def test_a_process_that_said_nothing_has_no_last_words() -> None:
    error = describe_end(1, doing="loading", oom_kills=(None, None), stderr=" \n")
    assert str(error) == "the model's process exited with code 1 while loading"
