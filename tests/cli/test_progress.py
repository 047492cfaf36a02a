from __future__ import annotations

import threading
import time

import pytest

from everlora.cli.progress import StageProgress


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress() as progress:
        for step in range(1, 4):
            progress("train", step, 3)
    assert capsys.readouterr() == ("", "")


def test_a_log_file_gets_one_line_for_stages_that_end_late(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress(delay_seconds=0.0) as progress:
        progress("train [1]", 1, 2)
        progress("train [1]", 2, 2)
        progress("train [1]", 2, 2)
        progress("measure", 1, 1)  # less than ten seconds after the line before
    out, err = capsys.readouterr()
    assert out == "" and err == "train [1]: 2/2 after 0 s\n"


def test_a_log_file_gets_a_sign_of_life_within_a_long_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("everlora.cli.progress.time.monotonic", lambda: now[0])
    with StageProgress() as progress:
        for step in range(1, 100):
            now[0] = float(step)
            progress("train", step, 0 if step > 40 else 100)
    assert capsys.readouterr().err.splitlines() == [
        "train: 10/100 after 10 s",
        "train: 40/100 after 40 s",
        "train: 70 after 70 s",
    ]


def test_a_terminal_gets_one_bar_per_stage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with StageProgress(delay_seconds=0.0) as progress:
        time.sleep(0.3)  # the bar of work without stages comes from a timer
        progress("train", 1, 2)
        progress("train", 2, 2)
        progress("measure", 5, 0)
    out, err = capsys.readouterr()
    assert out == ""
    assert "working" in err and "train" in err and "2/2" in err and "measure" in err and "5/?" in err


def test_no_thread_outlives_it_even_on_failure() -> None:
    before = threading.active_count()
    with pytest.raises(RuntimeError), StageProgress(delay_seconds=0.0) as progress:
        progress("train", 1, 2)
        raise RuntimeError
    time.sleep(0.05)
    assert threading.active_count() <= before  # a thread of an earlier test may end meanwhile


def test_many_stages_keep_few_bars() -> None:
    with StageProgress() as progress:
        progress("whole", 1, 10)
        for index in range(50):
            progress(f"stage {index}", 1, 1)
        names = list(progress._stages)
    assert len(names) <= 7 and "whole" in names and "stage 49" in names
