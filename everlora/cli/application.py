"""The `everlora` program: its verbs, and how a failure becomes one sentence and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from everlora import __version__
from everlora.cli import (
    catalogue,
    comparing,
    doctoring,
    forgetting,
    learning,
    managing,
    reporting,
    runs,
    sweeping,
    using,
)
from everlora.cli.parameters import Debug
from everlora.errors import EverloraError

__all__ = ["DONE", "FAILED", "INTERRUPTED", "WRONG_USE", "app", "main"]

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130

# Typer re-exports BadParameter alone; its base is the class of every complaint about arguments.
USAGE_ERROR: type[Any] = typer.BadParameter.__bases__[0]

VERBS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("init", learning.init),
    ("learn", learning.learn),
    ("predict", using.predict),
    ("eval", using.evaluate),
    ("status", managing.status),
    ("export", managing.export),
    ("rollback", managing.rollback),
    ("forget", forgetting.forget),
    ("run", runs.run),
    ("sweep", sweeping.sweep),
    ("compare", comparing.compare),
    ("report", reporting.report),
    ("recipes", runs.recipes),
    ("methods", catalogue.methods),
    ("doctor", doctoring.doctor),
)

app = typer.Typer(
    name="everlora",
    help="Continual learning for pretrained models with low-rank adapters.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for _name, _function in VERBS:
    app.command(_name)(_function)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"everlora {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """Continual learning for pretrained models with low-rank adapters."""


class _StandardError(logging.Handler):
    """Writes each record as one line to whatever `sys.stderr` is now: a progress bar may stand in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.levelname.lower()}: {self.format(record)}\n")


def _wants_debug(arguments: Sequence[str]) -> bool:
    """Whether `--debug` stands among the options (behind `--` it would be a text to predict)."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--debug" in options


def _quieten_libraries() -> None:
    """Ask the libraries below to keep their own bars and advice off the screen; a user's own setting wins."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _usage_sentence(error: Any) -> str:
    program = error.ctx.command_path if error.ctx is not None else "everlora"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; see '{program} --help'."


def _complain(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")


def _invoke(arguments: list[str]) -> int:
    code = app(args=arguments, prog_name="everlora", standalone_mode=False)
    sys.stdout.flush()
    if code == INTERRUPTED:  # newer Typer turns the interrupt into an exit code by itself
        raise KeyboardInterrupt
    return code if isinstance(code, int) else DONE


def _explain(error: BaseException) -> int:
    """Say what went wrong in one sentence and return the exit code that belongs to it."""
    if isinstance(error, USAGE_ERROR):
        _complain(_usage_sentence(error))
        return WRONG_USE
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _complain("interrupted; what a learner has learnt is as it was before this command.")
        return INTERRUPTED
    if isinstance(error, EverloraError):
        _complain(_sentence(error))
        # A combination that is declined is wrong use as well, though Python files it elsewhere than under ValueError.
        return WRONG_USE if isinstance(error, ValueError | NotImplementedError) else FAILED
    _complain(f"{type(error).__name__}: {_sentence(error)} (--debug shows where it happened)")
    return FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        arguments: the words after the program's name; `sys.argv[1:]` when not given.

    Returns:
        0 done, 1 failed, 2 wrong use or bad input, 130 interrupted. A failure is one sentence on standard error;
        `--debug` puts the traceback before it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = _wants_debug(words)
    logger, handler = logging.getLogger("everlora"), _StandardError()
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if not debug:
                _quieten_libraries()
            return _invoke(words)
    except BrokenPipeError:  # the reader of a pipe left early, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return _explain(error)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
