"""What a learner is asked: classes of texts and images, or the language of a causal language model."""

from collections.abc import Mapping
from typing import Any

from everlora.backbones import Backbone
from everlora.scenarios.base import Scenario
from everlora.scenarios.classes import ClassScenario
from everlora.scenarios.language import LanguageScenario
from everlora.scenarios.names import SCENARIOS, check_scenario, kind_of_model

__all__ = [
    "SCENARIOS",
    "ClassScenario",
    "LanguageScenario",
    "Scenario",
    "check_scenario",
    "kind_of_model",
    "make_scenario",
]


def make_scenario(name: str, *, backbone: Backbone, columns: Mapping[str, str]) -> Scenario[Any, Any]:
    """Make the scenario of that name; see `Scenario` for the arguments."""
    kinds: dict[str, type[Scenario[Any, Any]]] = {"encoder": ClassScenario, "causal_lm": LanguageScenario}
    return kinds[kind_of_model(name)](name, backbone=backbone, columns=columns)
