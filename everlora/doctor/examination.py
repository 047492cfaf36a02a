"""What is known of a learner directory while it is examined."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from everlora.doctor.arrays import Shapes
from everlora.doctor.findings import Finding, told
from everlora.doctor.folders import Stray
from everlora.errors import StoreError
from everlora.store import LearnerStore

__all__ = ["Examination"]


@dataclass
class Examination:
    """All that is known of a learner directory.

    Attributes:
        root: the directory.
        store: open for reading; None where learner.json cannot be read.
        findings: in the order they were made.
        strays: what nobody lists.
        links: links that leave the directory.
        listed: paths of the files that learner.json and the manifests list.
        bad_tasks: numbers of tasks of which something is missing or changed that learning or predicting needs.
        bad_states: numbers of the states that are missing or changed.
        shapes: of the factors of all layers.
        widths: of heads.
    """

    root: Path
    store: LearnerStore | None = None
    findings: list[Finding] = field(default_factory=list)
    strays: list[Stray] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)
    bad_tasks: set[int] = field(default_factory=set)
    bad_states: set[int] = field(default_factory=set)
    shapes: Shapes = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def tell(self, error: StoreError, file: str) -> Finding:
        """Make a finding of an error about a file below the directory."""
        return told(error, self.root, file)

    @property
    def way_back(self) -> int | None:
        """How many tasks one can go back to, where the newest learner is damaged and an earlier one is whole."""
        if self.store is None:
            return None
        count = len(self.store.tasks)
        if not self.bad_tasks and count - 1 not in self.bad_states:
            return None
        whole = min(self.bad_tasks, default=count - 1)
        kept = {entry.index + 1 for entry in self.store.states if entry.index not in self.bad_states}
        return max((number for number in kept if number <= whole), default=None)
