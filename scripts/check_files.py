"""Check files that are about to be committed: `python scripts/check_files.py FILE...`.

TOML and YAML must parse, notebooks must hold no output, and nothing outside `everlora/weights/` is over 250 kB.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import yaml

MAX_BYTES = 250_000
LARGE_FILES_BELONG_TO = "everlora/weights/"


def problem(path: Path) -> str | None:
    """Return what is wrong with the file in a few words, or None."""
    if path.stat().st_size > MAX_BYTES and not path.as_posix().startswith(LARGE_FILES_BELONG_TO):
        return f"has {path.stat().st_size} bytes, above {MAX_BYTES}"
    try:
        if path.suffix == ".toml":
            tomllib.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in {".yaml", ".yml"}:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            if any(cell.get("outputs") for cell in cells):
                return "holds output; clear it"
    except (ValueError, KeyError, yaml.YAMLError) as error:
        return f"does not parse: {error}"
    return None


def main(names: list[str]) -> int:
    """Print one line per problem; return the exit status."""
    found = 0
    for name in names:
        path = Path(name)
        reason = problem(path) if path.is_file() else None
        if reason:
            print(f"{name} {reason}")
            found = 1
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
