"""`python -m everlora`: the same as the command `everlora`."""

from __future__ import annotations

import sys

from everlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
