"""`python -m oomproof.worker`: see child.py."""

from __future__ import annotations

import sys

from oomproof.worker.child import main

if __name__ == "__main__":
    main(sys.argv[1:])
