"""Count the tests of several pytest runs: `python scripts/ci_summary.py fast.xml slow.xml`.

Reads the JUnit files that `pytest --junitxml` writes and prints one line, `everlora: 312 passed, 0 failed, 2 skipped`.
Exits with 1 when a test failed or a file is missing; a run that left no file counts as one failed test.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

FAILED_TAGS = {"failure", "error"}


def count(path: Path) -> Counter[str]:
    """Return how many tests of one JUnit file passed, failed and were skipped.

    A test that fails and whose clean-up also fails stands in the file twice and counts once.
    """
    outcomes: dict[tuple[str, str], str] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & FAILED_TAGS else "skipped" if "skipped" in tags else "passed"
        key = (case.get("classname", ""), case.get("name", ""))
        if outcomes.get(key) != "failed":
            outcomes[key] = outcome
    return Counter(outcomes.values())


def main(paths: list[str]) -> int:
    """Print the total of all files; return the exit status."""
    total: Counter[str] = Counter()
    for path in map(Path, paths):
        try:
            counts = count(path)
        except (OSError, ElementTree.ParseError) as error:
            print(f"no results of the tests in {path.name}: {error}")
            counts = Counter(failed=1)
        if not counts:
            print(f"{path.name} has no tests")
            counts = Counter(failed=1)
        total += counts
    skipped = f", {total['skipped']} skipped" if total["skipped"] else ""
    print(f"everlora: {total['passed']} passed, {total['failed']} failed{skipped}")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
