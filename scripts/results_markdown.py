"""Print the tables and claims of a run as Markdown, for a page of the documentation.

python scripts/results_markdown.py runs/cnn/results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from everlora.report import claims_caption, format_claims, tables


def markdown(results: dict[str, Any]) -> str:
    """Return every table of a run, each below its caption."""
    parts = [block(caption, table.columns, table.rows) for caption, table in tables(results)]
    if results.get("claims"):
        found = format_claims(results)
        parts.append(block(claims_caption(results), found.columns, found.rows))
    return "\n\n".join(parts)


def block(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One table; a bar inside a cell would end the cell."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [columns, ["---"] * len(columns), *rows]]
    return f"{caption}.\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
