"""Forgetting on request: rows of a class, a person or a predicate leave a learner's directory, and a record stays."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from everlora.backbones import Backbone
from everlora.errors import OptionError, nearest
from everlora.forgetting_plan import ForgettingPlan
from everlora.methods.base import Method
from everlora.results import Forgotten
from everlora.scenarios import Scenario
from everlora.selection import Condition, Selection, Where
from everlora.shared_directory import is_writer, reread, writing
from everlora.store import LearnerStore

__all__ = ["Forgets", "is_request"]

_SCRYPT = {"n": 2**14, "r": 8, "p": 1}
_ELSEWHERE = (
    "What lies outside of the learner's folder was not looked at: the data sets themselves, exports, backups, and "
    "copies of the folder."
)


class Forgets:
    """The part of a learner that forgets on request."""

    path: Path
    backbone: Backbone
    method: Method
    _device: str
    _store: LearnerStore
    _stale: bool
    _rules: Scenario[Any, Any]

    def forget(
        self,
        *,
        label: str | None = None,
        where: Where | None = None,
        task: str | int | None = None,
        rows: Any = None,
        reason: str | None = None,
    ) -> Forgotten:
        """Let rows leave buffers and kept validation rows; for whole classes, let prototypes and statistics go, too.

        What is given narrows the request: rows must meet all of it. What trained weights learned stays; the result
        says so. A class without its statistics is no longer predicted by methods made of statistics alone, such as
        `ncm`; trained classifier rows stay. States kept for `rollback`, and what earlier rollbacks put aside, are
        changed alike. An unfinished task begins anew. What is forgotten is deleted, not moved to `removed/`.

        Args:
            label: rows of this class.
            where: a text contained in the row, `"column=value"` (`text`, `output`, `row`, ..., and `id` of language
                rows where it is known), or a predicate that is called with each row as a mapping.
            task: name or number of the task that the rows were learned with.
            rows: rows as `learn` takes them; whatever equals one of them is meant.
            reason: for the record; it must not tell what is forgotten.

        Returns:
            What left and what could not. When nothing was found, nothing is changed.

        Raises:
            OptionError: nothing is asked for, or there is no such label or task.
            StoreError: the directory is damaged, or cannot be written.
            LockedError: another process is writing to it.
        """
        with writing(self.path, device=self._device) as store:
            if self._stale or store.digest != self._store.digest:
                self._load(store)
            selection = self._selection(label, where, task, rows)
            _check_reason(reason, selection)
            plan = ForgettingPlan(store, self.method, selection)
            self._stale = True
            if is_writer(store, device=self._device) and plan.left:
                record = {
                    "when": datetime.now(UTC).isoformat(timespec="seconds"),
                    "request": _hashed(label=label, where=where, task=task, rows=rows),
                    "left": dict(plan.left),
                    "reason": reason,
                }
                store.forget(plan.tasks, plan.states, record=record, delete=plan.delete)
        self._load(reread(store, device=self._device))
        return Forgotten(dict(plan.left), (*plan.remaining, *selection.remarks, _ELSEWHERE))

    def _selection(self, label: str | None, where: Where | None, task: str | int | None, rows: Any) -> Selection:
        if label is None and where is None and task is None and rows is None:
            raise OptionError("forget needs to know what: give label, where, task or rows.")
        rules = self._rules
        if label is not None and label not in rules.classes:
            known = nearest(label, rules.classes) if rules.classes else "it has no labels; use where='output=...'."
            raise OptionError(f"the learner has learned no label '{label}'; {known}")
        tokenizer = getattr(self.backbone.inputs, "tokenizer", None)
        return Selection(
            self.backbone,
            [entry.name for entry in self._store.tasks],
            list(rules.classes),
            label=label,
            task=None if task is None else self._task_index(task),
            condition=None if where is None else Condition(where, tokenizer),
            rows=None if rows is None else rules.load(rows, None, labelled=False),
        )

    def _load(self, store: LearnerStore) -> None:
        raise NotImplementedError

    def _task_index(self, task: str | int | None) -> int | None:
        raise NotImplementedError


def is_request(
    record: Mapping[str, Any],
    *,
    label: str | None = None,
    where: str | None = None,
    task: str | int | None = None,
    rows: Any = None,
) -> bool:
    """Whether a record of what was forgotten is of this request; a predicate, or rows, are not part of a record."""
    salt = bytes.fromhex(record["request"].partition("$")[0])
    return bool(_hashed(label=label, where=where, task=task, rows=rows, salt=salt) == record["request"])


def _hashed(*, label: Any, where: Any, task: Any, rows: Any, salt: bytes | None = None) -> str:
    """A slow hash of a request with a salt: whoever knows the request can tell it, and nobody can read it off."""
    salt = secrets.token_bytes(16) if salt is None else salt
    given = {"label": label, "where": where if isinstance(where, str) else where is not None, "task": task}
    text = json.dumps({**given, "rows": rows is not None}, sort_keys=True, default=str)
    return f"{salt.hex()}${hashlib.scrypt(text.encode(), salt=salt, dklen=32, **_SCRYPT).hex()}"


def _check_reason(reason: str | None, selection: Selection) -> None:
    condition = selection.condition
    if reason is not None and condition is not None and condition.value:
        if condition.value.casefold() in reason.casefold():
            raise OptionError("the reason holds the text that is to be forgotten, and the record keeps the reason.")
