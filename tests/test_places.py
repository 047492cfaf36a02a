"""Folders that the environment names."""

from __future__ import annotations

from pathlib import Path

import pytest

from everlora.places import cache_folder, shared_folder


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVERLORA_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "everlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "x")
    assert cache_folder() == Path("x/everlora")
    monkeypatch.setenv("HF_HOME", "h")
    assert cache_folder() == Path("h/everlora")
    monkeypatch.setenv("EVERLORA_CACHE", "mine")
    assert cache_folder() == Path("mine")


def test_the_shared_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVERLORA_SHARED", raising=False)
    assert shared_folder() == Path("../shared")
    monkeypatch.setenv("EVERLORA_SHARED", "")
    assert shared_folder() == Path("../shared")
    monkeypatch.setenv("EVERLORA_SHARED", "elsewhere")
    assert shared_folder() == Path("elsewhere")
