"""What a recipe says about its data, and what is measured on it beyond the tasks' own test sets."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from everlora.experiments.schema_part import Part

__all__ = ["ColumnNames", "DataSpec", "RetentionSpec", "SamplesSpec", "Subsample"]


class ColumnNames(Part):
    """Which column is what; those left out are found by type.

    Classifiers know `text`, `image`, `label` and `task`. For language models each may be the name of a column or a
    format string over columns, such as `"{question} {answer}"`.
    """

    text: str | None = None
    image: str | None = None
    label: str | None = None
    task: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None
    label_set: str | None = None
    id: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Only the columns that are named."""
        return self.model_dump(exclude_none=True)


class DataSpec(Part):
    """Where the examples come from.

    Attributes:
        hub: id of the data set on the Hugging Face hub.
        config: configuration of the hub data set.
        columns: column names in the hub data set (`text`, `image`, `label`, `task`, and for language models
            `instruction`, `input`, `output`, `prompt`, `answer`, `messages`, `label_set`, `id`); found by type when
            left out.
        shared: folder or file below `$EVERLORA_SHARED/data` that holds a local copy.
        shared_columns: column names in that copy, when they differ from the hub's.
        builtin: a data set that needs no file, such as `sklearn:digits`; nothing else is then looked at.
        image_size: side in pixels to which images of unequal sizes are brought while decoding.
        split: name of the only split of the hub data set, where it has no training split.
        drop_labels: class names that take no part.
        test_fraction: share of each class, or of rows without classes, held out as test set, for sources that come
            without one.
        split_seed: seed of that hold-out.
        sets: the data sets in order, for `stream.by: datasets`; each needs a `name`.
        name: name of the data set within `sets`; becomes the task's name.
    """

    hub: str | None = None
    config: str | None = None
    columns: ColumnNames | None = None
    shared: str | None = None
    shared_columns: ColumnNames | None = None
    builtin: str | None = None
    image_size: PositiveInt | None = None
    split: str | None = None
    drop_labels: tuple[str, ...] = ()
    test_fraction: float | None = Field(default=None, gt=0, lt=1)
    split_seed: int = 0
    sets: tuple[DataSpec, ...] = ()
    name: str | None = None

    @model_validator(mode="after")
    def _has_a_source(self) -> DataSpec:
        if not (self.hub or self.shared or self.builtin or self.sets):
            raise ValueError("names no source; give one of hub, shared, builtin or sets")
        if any(part.name is None for part in self.sets):
            raise ValueError("has an entry without a name under sets; give each data set a name")
        beside = sorted(self.model_fields_set - {"sets", "name"})
        if self.sets and beside:
            raise ValueError(f"has {beside[0]} beside sets, where nothing reads it; put it into each data set")
        return self


class Subsample(Part):
    """How much of the data is used; `None` takes all.

    Attributes:
        train: at most so many training examples of each class, or rows of each data set for a language model.
        test: the same for tests.
        train_bytes: the first so many bytes of each data set's training texts, for a language model.
        test_bytes: the same for tests.
        seed: of the draw.
    """

    train: PositiveInt | None = None
    test: PositiveInt | None = None
    train_bytes: PositiveInt | None = None
    test_bytes: PositiveInt | None = None
    seed: int = 0


class RetentionSpec(Part):
    """Texts that the pretrained language model writes itself, on which every stage is measured.

    Their cross-entropy after a stage minus the pretrained model's own estimates, per token, how far the model has gone
    from what it was.

    Attributes:
        samples: how many texts.
        max_tokens: longest text.
        seed: of the sampling; the same for all rows and seeds.

    Source: section 13 of the reference on I-LoRA.
    """

    samples: PositiveInt = 256
    max_tokens: PositiveInt = 256
    seed: int = 0


class SamplesSpec(Part):
    """Prompts that the model goes on from, before the first task and after each.

    Attributes:
        prompts: what it is given: a text to go on from as it stands, or a row with `instruction` and perhaps `input`,
            which the model's template makes a prompt of.
        max_new_tokens: longest continuation.
    """

    prompts: tuple[str | dict[str, str], ...] = Field(min_length=1)
    max_new_tokens: PositiveInt = 48
