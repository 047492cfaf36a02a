from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import everlora
from everlora.cli import app
from everlora.cli import application as application_module
from everlora.errors import DataError, EverloraError, LockedError, UnsupportedError
from tests.cli.fakes import FakeLearner

VERBS = [
    "init",
    "learn",
    "predict",
    "eval",
    "status",
    "export",
    "rollback",
    "forget",
    "run",
    "sweep",
    "compare",
    "report",
    "recipes",
    "methods",
    "doctor",
]
HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "sklearn", "kornia", "matplotlib")


def _fresh(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, which ends by printing the heavy modules it imported."""
    code = (
        "import sys; from everlora.cli import main; code = main(sys.argv[1:]);"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)


def test_help_lists_exactly_the_verbs_that_work(call: Any) -> None:
    code, out, _ = call("--help")
    listed = [line.split()[1] for line in out.splitlines() if line.startswith("│ ") and line[2].isalpha()]
    assert code == 0
    assert listed == VERBS


def test_no_words_print_the_help(call: Any) -> None:
    code, out, _ = call()
    assert code == 0 and "Usage: everlora" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_json_and_debug(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "--json" in result.output and "--debug" in result.output


@pytest.mark.parametrize("words", [["--help"], ["learn", "--help"], ["methods"], ["methods", "inflora"], ["recipes"]])
def test_listings_and_help_import_nothing_heavy(words: list[str]) -> None:
    done = _fresh(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("HEAVY []\n")


def test_status_imports_nothing_heavy(intents: Path) -> None:
    done = _fresh("status", str(intents), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("HEAVY []\n")
    assert [task["name"] for task in json.loads(done.stdout)["tasks"]] == ["january", "february"]


def test_version(call: Any) -> None:
    assert call("--version") == (0, f"everlora {everlora.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lern"], "No such command 'lern'"),
        (["learn", "folder"], "Missing argument 'DATA'"),
        (["status", "folder", "--colour"], "No such option: --colour"),
        (["rollback", "folder", "--to-task", "two"], "'--to-task'"),
        (["init", "folder", "--set", "rank"], "expected KEY=VALUE, found 'rank'"),
        (["init", "folder", "--seed", "1", "--set", "seed=2"], "the option 'seed' is given twice"),
        (["run", "digits", "--seeds", "1,two"], "expected whole numbers"),
        (["predict", "folder"], "give either texts or image files, or --input FILE"),
        (["predict", "folder", "text", "--input", "x.csv"], "give either texts or image files, or --input FILE"),
        (["predict", "folder", "text", "--output", "x.csv"], "--output goes with --input FILE"),
    ],
)
def test_wrong_use_is_one_sentence_and_code_2(call: Any, words: list[str], said: str) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and "--help" in err
    assert said in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("january.csv holds no rows; give at least one."), 2),
        (LockedError("intents is being written to; wait for it."), 2),
        (UnsupportedError("method 'ncm' is not for causal language models; choose another."), 2),
        (EverloraError("something else."), 1),
        (OSError(28, "No space left on device"), 1),
        (RuntimeError("first line\n  second line"), 1),
    ],
)
def test_errors_become_one_line_and_the_right_code(
    call: Any, learner: type[FakeLearner], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(learner, "evaluate", fail)
    found, out, err = call("eval", "folder")
    assert (found, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert " ".join(str(error).split()) in err
    assert ("--debug" in err) == (not isinstance(error, EverloraError))


def test_debug_shows_the_traceback_before_the_sentence(call: Any, learner: type[FakeLearner]) -> None:
    for words in (("eval", "folder", "missing.csv", "--debug"), ("--debug", "eval", "folder", "missing.csv")):
        code, _, err = call(*words)
        assert (
            code == 2
            and err.startswith("Traceback")
            and err.endswith("error: missing.csv does not exist; give a file.\n")
        )


def test_debug_behind_two_dashes_is_a_text(call: Any, learner: type[FakeLearner]) -> None:
    assert call("predict", "folder", "--json", "--", "--debug")[0] == 0
    assert learner.calls[-1] == ("predict", (["--debug"], None))


def test_interrupt_is_one_sentence(call: Any, learner: type[FakeLearner], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learner, "evaluate", interrupt)
    code, out, err = call("eval", "folder")
    assert (code, out) == (130, "")
    assert err.startswith("error: interrupted") and err.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_failure() -> None:
    command = (
        f"{sys.executable} -c 'import sys; from everlora.cli import main; sys.exit(main())' methods inflora --json"
    )
    script = f"set -o pipefail; {command} | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_warnings_of_the_library_reach_standard_error_alone(
    call: Any, learner: type[FakeLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = FakeLearner.evaluate

    def warn(self: FakeLearner, data: str | None, **columns: Any) -> Any:
        logging.getLogger("everlora.streams").warning("2 texts were cut")
        logging.getLogger("everlora.streams").info("detail")
        return answer(self, data)

    monkeypatch.setattr(learner, "evaluate", warn)
    _, out, err = call("eval", "folder", "--json")
    assert err == "warning: 2 texts were cut\n" and json.loads(out)["accuracy"] == 0.8
    assert "info: detail" in call("eval", "folder", "--debug")[2]
    assert logging.getLogger("everlora").handlers == []


def test_main_leaves_warning_filters_as_they_were(call: Any) -> None:
    import warnings

    before = list(warnings.filters)
    call("methods")
    assert list(warnings.filters) == before


def test_the_table_of_verbs_holds_functions_of_their_own_modules() -> None:
    assert [name for name, _ in application_module.VERBS] == VERBS
    assert all(isinstance(function, types.FunctionType) for _, function in application_module.VERBS)
