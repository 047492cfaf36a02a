"""`everlora forget`, with a stand-in for the learner and with a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everlora import Learner
from everlora.results import Forgotten
from tests.cli.fakes import FakeLearner
from tests.toy import tiny_model, toy_learner, toy_tasks

LEFT = {"buffer_rows": 3, "validation_rows": 1}


@pytest.fixture
def forgetful(learner: type[FakeLearner], monkeypatch: pytest.MonkeyPatch) -> type[FakeLearner]:
    def forget(self: FakeLearner, **asked: Any) -> Forgotten:
        self.calls.append(("forget", asked))
        return Forgotten(LEFT if asked["label"] else {}, ("weights stay.",))

    monkeypatch.setattr(learner, "forget", forget, raising=False)
    return learner


def test_words_become_a_request(call: Any, call_json: Any, forgetful: type[FakeLearner], intents: Path) -> None:
    code, out, _ = call("forget", intents, "--label", "refund", "--where", "id=42", "--task", "january")
    asked = {"label": "refund", "where": "id=42", "task": "january", "rows": None, "reason": None}
    assert code == 0 and forgetful.calls[-1] == ("forget", asked)
    assert "3 buffer rows, 1 validation row." in out and "- weights stay." in out
    assert call_json("forget", intents, "--label", "refund") == {"left": LEFT, "remaining": ["weights stay."]}
    _, out, _ = call("forget", intents, "--rows", "ada.csv", "--reason", "ticket 7")
    assert "Nothing of the kind was found" in out
    assert forgetful.calls[-1][1] == {**dict.fromkeys(asked), "rows": "ada.csv", "reason": "ticket 7"}


def test_nothing_asked_for_is_wrong_use(call: Any, forgetful: type[FakeLearner], intents: Path) -> None:
    code, _, err = call("forget", intents)
    assert code == 2 and "rows must meet all" in err and not forgetful.calls


def test_a_learner_forgets_and_status_tells(call: Any, call_json: Any, tmp_path: Path) -> None:
    learner = toy_learner(tmp_path / "l", tiny_model("vit", tmp_path / "vit"), "replay", size=16, keep_validation=2)
    learner.learn(toy_tasks("image", 1)[0])
    done = call_json("forget", learner.path, "--label", "class a", "--reason", "ticket 7")
    assert done["left"]["validation_rows"] == 2 and done["left"]["buffer_rows"] > 0
    [record] = call_json("status", learner.path)["forgotten"]
    assert record["left"] == done["left"] and record["reason"] == "ticket 7"
    _, out, _ = call("status", learner.path)
    assert "Forgotten on request, 20" in out and "2 validation rows (ticket 7)" in out
    assert len(Learner.open(learner.path).tasks) == 1
    code, _, err = call("forget", learner.path, "--label", "class q")
    assert code == 2 and "no label 'class q'" in err
