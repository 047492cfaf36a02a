"""The flat options a user gives, sorted into those of the method, the training, the model and the learner."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from everlora.backbones import Backbone, feature_depth
from everlora.errors import OptionError, UnsupportedError, nearest
from everlora.heads import HeadOptions
from everlora.methods import DEFAULT, MethodSpec, method_spec
from everlora.methods.base import Method
from everlora.methods.catalogue import RECOMMENDED
from everlora.methods.headed import with_head
from everlora.methods.registry import parse_options
from everlora.training import Interval, TrainingOptions

__all__ = ["LearnerOptions", "ModelOptions", "Settings", "usual_choice"]


@dataclass(frozen=True)
class ModelOptions:
    """How the pretrained model is used.

    Attributes:
        pooling: `auto`, by architecture, or `cls`, `mean`, `pooler`, `cls_mean`.
        normalize: `processor`, the model's own pixel normalisation, or `unit`, pixels in [0, 1].
        dtype: of the weights.
        max_length: tokens a text is cut to; None takes what the model was made for.
        image_size: pixels an image is resized to; None takes what the model was made for.
        feature_layers: how many of an encoder's last layers are pooled; their vectors stand side by side as features.
        quantization: weights of a language model in 4 or 8 bits.
        template: how a language model's instructions become a prompt: `auto`, `chat`, `plain` or a template's text.
        train_on_inputs: let a language model learn prompts, too, and not answers only.
        block_size: tokens of the blocks that plain text is cut into for a language model; None takes `max_length`.
    """

    pooling: str = "auto"
    normalize: Literal["processor", "unit"] = "processor"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: Annotated[int, Field(ge=1)] | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    feature_layers: Annotated[int, Field(ge=1)] = 1
    quantization: Literal["none", "4bit", "8bit"] = "none"
    template: str = "auto"
    train_on_inputs: bool = False
    block_size: Annotated[int, Field(ge=2)] | None = None


def _interval(value: Any) -> str:
    Interval.of(value)
    return str(value).strip()


@dataclass(frozen=True)
class LearnerOptions:
    """What the learner directory keeps.

    Attributes:
        keep_validation: rows of each class held out from training and kept, so that every task's accuracy can be
            followed; 0 keeps none.
        keep_states: `newest` keeps what the last two tasks carried on, `all` everything (deeper `rollback`).
        start_from: folder of a PEFT LoRA adapter of the same base model to go on from; it is needed until the first
            task is learned.
        max_new_tokens: how long a language model's answers may be.
        checkpoint_every: how often the task that is being learned is saved within: steps as in 200, seconds as in 300s,
            or 0 for never. It may be given anew for each task.
    """

    keep_validation: Annotated[int, Field(ge=0)] = 0
    keep_states: Literal["newest", "all"] = "newest"
    start_from: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    checkpoint_every: Annotated[str, BeforeValidator(_interval)] = "300s"


@dataclass(frozen=True)
class Settings:
    """All options of a learner, validated.

    Attributes:
        method: the registered method and the options its name sets.
        method_options: an instance of the method's options class.
        training: how tasks are trained.
        model: how the pretrained model is used.
        learner: what the directory keeps.
        head: what turns features into scores.
    """

    method: MethodSpec
    method_options: Any
    training: TrainingOptions
    model: ModelOptions
    learner: LearnerOptions
    head: HeadOptions = dataclasses.field(default_factory=HeadOptions)

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any]) -> Settings:
        """Sort flat options by name and validate them.

        Raises:
            OptionError: an unknown name (the nearest are given) or a value out of range.
            UnsupportedError: several layers for a method whose tasks have networks of their own.
        """
        spec = method_spec(method)
        owners: dict[str, tuple[str, ...]] = {
            "method": spec.option_names,
            "training": _names(TrainingOptions),
            "model": _names(ModelOptions),
            "learner": _names(LearnerOptions),
            "head": _names(HeadOptions),
        }
        parts: dict[str, dict[str, Any]] = {owner: {} for owner in owners}
        for key, value in options.items():
            owner = next((owner for owner, names in owners.items() if key in names), None)
            if owner is None:
                known = [name for names in owners.values() for name in names]
                raise OptionError(f"there is no option '{key}' for method '{spec.name}'; {nearest(key, known)}")
            parts[owner][key] = value
        # The method's own defaults enter here only, so that a stored learner keeps those it was made with.
        defaults = spec.method_class.training_defaults(spec.options(parts["method"]))
        parts["training"] = {**defaults, **parts["training"]}
        made = cls.from_parts(spec, parts)
        if spec.method_class.isolated and made.model.feature_layers > 1:
            # transformers hands out the states of the blocks it was built with, not of those put in their place
            raise UnsupportedError(
                f"feature_layers reads layers of one encoder, and '{spec.name}' has a network for each task; leave "
                "feature_layers out."
            )
        return made

    @classmethod
    def from_parts(cls, spec: MethodSpec, parts: Mapping[str, Mapping[str, Any]]) -> Settings:
        """Validate options that are sorted already, as `as_parts` returned them."""
        return cls(
            spec,
            spec.options(parts["method"]),
            parse_options(TrainingOptions, parts["training"], "training"),
            parse_options(ModelOptions, parts["model"], "the model"),
            parse_options(LearnerOptions, parts["learner"], "the learner"),
            parse_options(HeadOptions, parts.get("head", {}), "the head"),  # older learners have no such part
        )

    def make_method(self, backbone: Backbone) -> Method:
        """Make the method on a model.

        Raises:
            UnsupportedError: the method cannot have that head.
        """
        made = with_head(self.method.method_class, self.head)
        return made(self.method_options, backbone, seed=self.training.seed)

    def as_parts(self) -> dict[str, dict[str, Any]]:
        """Every option with its value, as plain JSON: later changes of a default do not touch a stored learner."""
        return {
            "method": _plain(self.method_options),
            "training": _plain(self.training),
            "model": _plain(self.model),
            "learner": _plain(self.learner),
            "head": _plain(self.head),
        }

    def changed(self) -> dict[str, Any]:
        """Options whose values are not those a learner of this method has by default, as `group.name`."""
        usual = Settings.of(self.method.name, {}).as_parts()
        return {
            f"{group}.{name}": value
            for group, options in self.as_parts().items()
            for name, value in options.items()
            if value != usual[group][name]
        }

    def with_training(self, changes: Mapping[str, Any]) -> Settings:
        """Return the settings with other training options, or another `checkpoint_every`, for one task.

        Raises:
            OptionError: a name that is not a training option.
        """
        values = {**_plain(self.training), **changes}
        kept = _plain(self.learner)
        if "checkpoint_every" in changes:
            kept["checkpoint_every"] = values.pop("checkpoint_every")
        return dataclasses.replace(
            self,
            training=parse_options(TrainingOptions, values, "training"),
            learner=parse_options(LearnerOptions, kept, "the learner"),
        )


def usual_choice(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a classifier is made with where no method is named: options beside those that were given.

    Args:
        options: what was given, flat. Options of adapters or of training mean a method that has use for them, so the
            default of `Learner.create`; without any, what `everlora.methods.catalogue.RECOMMENDED` says, as far as
            the model has so many layers to give.

    Returns:
        `method`, and perhaps more.

    Raises:
        ModelError: the model that is named cannot be read.
    """
    trained = {*method_spec(DEFAULT).option_names, *_names(TrainingOptions)} - {"seed"}
    if trained & set(options):
        return {"method": DEFAULT}
    choice = {key: value for key, value in RECOMMENDED.items() if key not in options}
    if "feature_layers" in choice:
        depth = feature_depth(options.get("model", "packaged"), options.get("pooling", "auto"))
        choice["feature_layers"] = min(choice["feature_layers"], depth)
    return choice


def _names(options_type: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(options_type))


def _plain(options: Any) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {key: _as_json(value) for key, value in values.items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): item for key, item in value.items()}  # JSON's keys are strings, before and after storing
    if isinstance(value, float) and math.isinf(value):
        return str(value)  # which JSON's numbers do not have, and validation reads
    return list(value) if isinstance(value, tuple) else value
