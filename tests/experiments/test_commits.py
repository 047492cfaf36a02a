from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from everlora.experiments.commits import commits

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def repository(folder: Path, file: str) -> str:
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text("1")
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "first", "--no-gpg-sign"],
    ):
        subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True)
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_both_repositories_with_their_changes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    first, second = repository(ours, "everlora/__init__.py"), repository(theirs, "work/notes.txt")
    assert commits(ours / "everlora", theirs / "work") == {"everlora": first, "working folder": second}
    (theirs / "work" / "notes.txt").write_text("2")
    (ours / "everlora" / "new.py").write_text("untracked files are no change of the code")
    found = commits(ours / "everlora", theirs / "work")
    assert found == {"everlora": first, "working folder": f"{second}, with changes"}


def test_one_repository_is_named_once_and_an_installed_package_has_none(tmp_path: Path) -> None:
    commit = repository(tmp_path, "everlora/__init__.py")
    assert commits(tmp_path / "everlora", tmp_path) == {"everlora": commit}
    installed = tmp_path / "venv" / "everlora"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert commits(installed, tmp_path) == {"working folder": commit}


def test_without_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commits(tmp_path, tmp_path) == {}
    monkeypatch.setenv("PATH", "")
    assert commits(tmp_path, tmp_path) == {}
