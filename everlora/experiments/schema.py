"""What a recipe file may say: frozen pydantic models, free of torch.

Percentages stand in `published` only, because there they are quoted as their source printed them; everything else is a
fraction, a count or a name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from everlora.methods.catalogue import DEFAULT

__all__ = [
    "ClaimSpec",
    "ColumnNames",
    "DataSpec",
    "Family",
    "Figure",
    "MethodRow",
    "OptionValue",
    "PublishedFigure",
    "Recipe",
    "Setting",
    "StreamSpec",
    "Subsample",
    "ValidationSpec",
]

OptionValue = bool | int | float | str | list[bool | int | float | str] | None
Options = dict[str, OptionValue]
Percent = float
Family = Literal["rehearsal", "distance-based", "sub-networks", "dynamic networks", "reference"]
Figure = Literal[
    "til",
    "cil",
    "learning_acc",
    "forgetting_til",
    "bwt_til",
    "forgetting_cil",
    "bwt_cil",
    "task_recognition",
    "params_growth",
    "growth_per_task",
    "e95_own",
    "e95_ref",
    "s95_ref",
    "aulc",
    "sec_step",
    "sec_task",
    "peak_mem",
    "state_bytes",
]


class _Part(BaseModel):
    """Base of all parts: nothing can be changed after reading, and nothing unknown is let through."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnNames(_Part):
    """Which column is what; those left out are found by type."""

    text: str | None = None
    image: str | None = None
    label: str | None = None
    task: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Only the columns that are named."""
        return self.model_dump(exclude_none=True)


class DataSpec(_Part):
    """Where the examples come from.

    Attributes:
        hub: id of the data set on the Hugging Face hub.
        config: configuration of the hub data set.
        columns: column names in the hub data set (`text`, `image`, `label`, `task`); found by type when left out.
        shared: folder below `$EVERLORA_SHARED/data` that holds a local copy.
        shared_columns: column names in that copy, when they differ from the hub's.
        builtin: a data set that needs no file, such as `sklearn:digits`; nothing else is then looked at.
        image_size: side in pixels to which images of unequal sizes are brought while decoding.
        split: name of the only split of the hub data set, where it has no training split.
        drop_labels: class names that take no part.
        test_fraction: share of each class held out as test set, for sources that come without one.
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
        return self


class StreamSpec(_Part):
    """How the examples become tasks.

    Attributes:
        by: `class` (groups of classes), `column` (one task per value of the task column) or `datasets`.
        initial: classes in the first task; `None` takes `increment`.
        increment: classes in each later task.
        scenario: what is known at test time.
        order: `seed` (the run's seed orders the classes), `natural` (the source's own order) or a fixed seed.
        task_order: values of the task column in the order wanted, for `by: column`.
        tasks: only so many tasks, the first ones; `None` takes all.
    """

    by: Literal["class", "column", "datasets"] = "class"
    initial: PositiveInt | None = None
    increment: PositiveInt | None = None
    scenario: Literal["class_incremental", "domain_incremental", "task_incremental", "language"] = "class_incremental"
    order: Literal["seed", "natural"] | int = "seed"
    task_order: tuple[str, ...] | None = None
    tasks: PositiveInt | None = None

    @model_validator(mode="after")
    def _classes_have_an_increment(self) -> StreamSpec:
        if self.by == "class" and self.increment is None:
            raise ValueError("splits by class without increment; give the number of classes of each later task")
        return self


class MethodRow(_Part):
    """One row of the table: a registered method with its options and, if they differ, training options.

    Attributes:
        method: a registered name.
        label: what the table calls the row.
        family: which kind of remedy against forgetting it is.
        trials: how many values of its learning rate were tried before one was written down.
        set: options.
    """

    method: str
    label: str | None = None
    family: Family | None = None
    trials: PositiveInt | None = None
    set: Options = {}


class Subsample(_Part):
    """At most this many examples of each class; `None` takes all."""

    train: PositiveInt | None = None
    test: PositiveInt | None = None
    seed: int = 0


class ValidationSpec(_Part):
    """How `evaluate_on: validation` gets its examples.

    The source's own validation split where it has one, else this share of each class's training examples.
    """

    fraction: float = Field(default=0.1, gt=0, lt=1)
    seed: int = 0


class Setting(_Part):
    """A size of the experiment: what is cut down or changed, and how long it then takes.

    Attributes:
        description: one line for the listing.
        minutes: about how long one row with one seed takes on the hardware the recipe's header names.
        subsample: how many examples of each class are used.
        stream: fields of the recipe's `stream` that differ.
        training: training options that differ.
        set: method options that differ, given to every row whose method knows them.
        evaluate_on: `validation` leaves the test sets alone altogether.
        model: base models instead of the recipe's.
        seeds: seeds instead of the recipe's.
        methods: rows run by default in this setting; `None` takes the recipe's `default_methods`.
    """

    description: str | None = None
    minutes: PositiveFloat | None = None
    subsample: Subsample = Subsample()
    stream: dict[str, OptionValue] = {}
    training: Options = {}
    set: Options = {}
    evaluate_on: Literal["test", "validation"] = "test"
    model: tuple[str, ...] | None = Field(default=None, min_length=1)
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    methods: tuple[str, ...] | None = None


class ClaimSpec(_Part):
    """A statement about two rows that a run can bear out or contradict.

    Attributes:
        claim: the statement, as somebody made it.
        test: what must hold, for each of `figures` and seed by seed: `greater` or `less` compares `row` with
            `against`; `only_zero` wants exactly 0 in `row`, and more than `margin` in `against`; `unchanged` wants the
            pretrained tensors and those of earlier tasks of `row` to stay as they were, bit for bit.
        row: the row it is about.
        against: the row that it is compared with.
        figures: the numbers that decide, all of them.
        shown: numbers that are reported with it and decide nothing.
        margin: by how much `greater` and `less` may be missed, and what `only_zero` asks of the other row.
        published: what is known of it from its source.
    """

    claim: str
    test: Literal["greater", "less", "only_zero", "unchanged"]
    row: str
    against: str | None = None
    figures: tuple[Figure, ...] = ()
    shown: tuple[Figure, ...] = ()
    margin: float = Field(default=0.0, ge=0)
    published: str = ""

    @model_validator(mode="after")
    def _has_what_its_test_needs(self) -> ClaimSpec:
        if self.test == "unchanged":
            if self.against or self.figures:
                raise ValueError("tests for unchanged tensors, which needs neither against nor figures; leave them out")
        elif not self.against or not self.figures:
            raise ValueError("compares rows and needs both against and figures; add them")
        return self


class PublishedFigure(_Part):
    """A number somebody else printed, in percent, with its source.

    Attributes:
        source: who printed it.
        setting: which of the recipe's settings it belongs to.
        method: row.
        label: what the row is called there.
        last: accuracy over all tasks at the end.
        last_sd: its deviation.
        avg: mean of that accuracy after each task.
        avg_sd: its deviation.
        learning: accuracy right after each task, the task given.
        growth: parameters that one more task adds, in percent of the network.
        note: what else must be known.
    """

    source: str
    setting: str = "standard"
    method: str = DEFAULT
    label: str | None = None
    last: Percent | None = Field(default=None, ge=0, le=100)
    last_sd: Percent | None = Field(default=None, ge=0, le=100)
    avg: Percent | None = Field(default=None, ge=0, le=100)
    avg_sd: Percent | None = Field(default=None, ge=0, le=100)
    learning: Percent | None = Field(default=None, ge=0, le=100)
    growth: Percent | None = Field(default=None, ge=0)
    note: str | None = None


class Recipe(_Part):
    """A whole experiment.

    Attributes:
        name: the file's name without its ending.
        title: one line.
        status: `runs-here` when our own figures exist, `not-run-here` when only published ones do.
        description: what is trained and why it is worth looking at.
        data: where the examples come from.
        stream: how they become tasks.
        model: base models in order of preference; the first that can be found is used.
        backbone: backbone options (pooling, normalize, max_length, image_size).
        training: training options for every row.
        methods: the rows that exist.
        default_methods: the rows that run when none are named, baselines included.
        seeds: the seeds that run when none are named.
        settings: sizes of the experiment.
        default_setting: the one that runs when none is named.
        workers: processes that share rows and seeds when no number is given; never more than there are cores.
        table: which numbers are printed: `accuracy`, or `head_to_head` with growth, speed and cost.
        reference: row whose best accuracy on a task the speed of the others is measured by.
        claims: statements that the run is held against.
        validation: how a validation set is made.
        published: figures of others.
        notes: what we measured and what to keep in mind.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    status: Literal["runs-here", "not-run-here"]
    description: str
    data: DataSpec
    stream: StreamSpec
    model: tuple[str, ...] = Field(min_length=1)
    backbone: Options = {}
    training: Options = {}
    methods: dict[str, MethodRow] = Field(min_length=1)
    default_methods: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    settings: dict[str, Setting] = {"standard": Setting()}
    default_setting: str = "standard"
    workers: PositiveInt = 1
    table: Literal["accuracy", "head_to_head"] = "accuracy"
    reference: str | None = None
    claims: dict[str, ClaimSpec] = {}
    validation: ValidationSpec = ValidationSpec()
    published: tuple[PublishedFigure, ...] = ()
    notes: str = ""
