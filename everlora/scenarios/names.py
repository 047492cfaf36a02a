"""Names of the scenarios, and the kind of model that each needs."""

from __future__ import annotations

from everlora.errors import OptionError, nearest

__all__ = ["SCENARIOS", "check_scenario", "kind_of_model"]

_KINDS = {
    "class_incremental": "encoder",
    "domain_incremental": "encoder",
    "task_incremental": "encoder",
    "language": "causal_lm",
}
SCENARIOS = tuple(_KINDS)


def check_scenario(scenario: str) -> str:
    """Return the scenario's name in its plain spelling.

    Raises:
        OptionError: there is no such scenario.
    """
    name = scenario.strip().lower().replace("-", "_")
    if name not in SCENARIOS:
        raise OptionError(f"there is no scenario '{scenario}'; {nearest(name, SCENARIOS)}")
    return name


def kind_of_model(scenario: str) -> str:
    """Return the `kind` that `load_backbone` is to be given for a scenario."""
    return _KINDS[scenario]
