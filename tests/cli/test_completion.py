"""What a shell is offered, through the protocol that shells speak with the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everlora.cli import completion
from everlora.scenarios import SCENARIOS

CODE = (
    "import sys, atexit; from everlora.cli import main\n"
    "atexit.register(lambda: 'torch' in sys.modules and print('TORCH'))\n"
    "sys.exit(main([]))"
)


def ask(words: str, **more: str) -> list[str]:
    """The words that bash is offered for the last one."""
    protocol = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_EVERLORA_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, **protocol, **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


def test_a_shell_is_offered_methods_without_torch() -> None:
    offered = ask("everlora init --method sd_")
    assert set(offered) == {"sd_lora", "sd_lora_rr", "sd_lora_kd"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("everlora run digi", {"digits", "digits-domains"}),
        ("everlora recipes digi", {"digits", "digits-domains"}),
        ("everlora methods packn", {"packnet"}),
        ("everlora run digits --methods inflora,seq", {"inflora,sequential"}),
        ("everlora export a b --format p", {"peft"}),
        ("everlora init --scenario l", {"language"}),
        ("everlora run digits --track tensorboard,wa", {"tensorboard,wandb"}),
        ("everlora repo", {"report"}),
    ],
)
def test_a_shell_is_offered_what_fits(words: str, offered: set[str]) -> None:
    assert set(ask(words)) == offered


def test_what_was_named_is_not_offered_again() -> None:
    offered = [word for word, _ in completion.method_list("joint,")]
    assert "joint,inflora" in offered and "joint,joint" not in offered and "joint,all" in offered


def test_scenarios_are_all_offered() -> None:
    assert [name for name, _ in completion.scenarios("")] == list(SCENARIOS)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_and_installed(shell: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for option in ("--show-completion", "--install-completion"):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from everlora.cli import main; sys.exit(main())", option, shell],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if option == "--show-completion":
            assert "_EVERLORA_COMPLETE" in done.stdout
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "_EVERLORA_COMPLETE" in path.read_text()]
    assert written
