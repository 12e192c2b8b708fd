"""Where oomproof keeps its own files.

What rehearsals measured, kernels that were compiled, launches that tuning found, which models run
now, what is known of allocations that failed, and pickles that were made into safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def home_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """$OOMPROOF_HOME, else $XDG_STATE_HOME/oomproof, else ~/.local/state/oomproof.

    Raises:
        RuntimeError: None of them is set, and this user has no home.
    """
    if home := environ.get("OOMPROOF_HOME"):
        return Path(home)
    state = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "oomproof"
