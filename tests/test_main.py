"""The package as a program."""

from __future__ import annotations

import subprocess
import sys


def test_python_m_oomproof_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "oomproof", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("oomproof ")
