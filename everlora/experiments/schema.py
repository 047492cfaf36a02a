"""What a recipe file may say: frozen pydantic models, free of torch.

Percentages stand in `published` only, because there they are quoted as their source printed them; everything else is a
fraction, a count or a name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from everlora.experiments.schema_claims import ClaimSpec, Figure
from everlora.experiments.schema_data import ColumnNames, DataSpec, RetentionSpec, SamplesSpec, Subsample
from everlora.experiments.schema_part import Options, OptionValue, Part
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
    "RetentionSpec",
    "SamplesSpec",
    "Setting",
    "StreamSpec",
    "Subsample",
    "ValidationSpec",
]

Percent = float
Family = Literal["rehearsal", "distance-based", "sub-networks", "dynamic networks", "reference"]


class StreamSpec(Part):
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


class MethodRow(Part):
    """One row of the table: a registered method with its options and, if they differ, training options.

    Attributes:
        method: a registered name.
        label: what the table calls the row.
        family: which kind of remedy against forgetting it is.
        trials: how many values of its learning rate were tried before one was written down.
        ablation: whether it is a variation of another row; it stands in the tables and not in the charts of language.
        weights: of a method with several weights to predict with, those that are measured; `None` takes all.
        own_texts: so many texts that the pretrained language model writes itself are put into the method's memory
            before the first task.
        set: options.
    """

    method: str
    label: str | None = None
    family: Family | None = None
    trials: PositiveInt | None = None
    ablation: bool = False
    weights: tuple[str, ...] | None = Field(default=None, min_length=1)
    own_texts: PositiveInt | None = None
    set: Options = Field(default={})


class ValidationSpec(Part):
    """How `evaluate_on: validation` gets its examples.

    The source's own validation split where it has one, else this share of each class's training examples; of rows for
    a language model this share of all, and of a few long texts this share of each text, at its end.
    """

    fraction: float = Field(default=0.1, gt=0, lt=1)
    seed: int = 0


class Setting(Part):
    """A size of the experiment: what is cut down or changed, and how long it then takes.

    Attributes:
        description: one line for the listing.
        minutes: about how long one row with one seed takes on the hardware the recipe's header names.
        subsample: how much of the data is used.
        stream: fields of the recipe's `stream` that differ.
        backbone: backbone options that differ.
        training: training options that differ.
        set: method options that differ, given to every row whose method knows them.
        evaluate_on: `validation` leaves the test sets alone altogether.
        model: base models instead of the recipe's.
        seeds: seeds instead of the recipe's.
        methods: rows run by default in this setting; `None` takes the recipe's `default_methods`.
        retention: instead of the recipe's.
        samples: instead of the recipe's.
    """

    description: str | None = None
    minutes: PositiveFloat | None = None
    subsample: Subsample = Subsample()
    stream: dict[str, OptionValue] = Field(default={})
    backbone: Options = Field(default={})
    training: Options = Field(default={})
    set: Options = Field(default={})
    evaluate_on: Literal["test", "validation"] = "test"
    model: tuple[str, ...] | None = Field(default=None, min_length=1)
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    methods: tuple[str, ...] | None = None
    retention: RetentionSpec | None = None
    samples: SamplesSpec | None = None


class PublishedFigure(Part):
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


class Recipe(Part):
    """A whole experiment.

    Attributes:
        name: the file's name without its ending.
        title: one line.
        status: `runs-here` when our own figures exist, `not-run-here` when only published ones do.
        description: what is trained and why it is worth looking at.
        data: where the examples come from.
        stream: how they become tasks.
        model: base models in order of preference; the first that can be found is used.
        backbone: backbone options (pooling, normalize, max_length, image_size, feature_layers).
        training: training options for every row.
        methods: the rows that exist.
        default_methods: the rows that run when none are named, baselines included.
        seeds: the seeds that run when none are named.
        settings: sizes of the experiment.
        default_setting: the one that runs when none is named.
        workers: processes that share rows and seeds when no number is given; never more than there are cores.
        table: which numbers are printed: `accuracy`, `head_to_head` with growth, speed and cost, or `language`.
        reference: row whose best accuracy on a task the speed of the others is measured by.
        claims: statements that the run is held against.
        validation: how a validation set is made.
        retention: for a language model, texts of its own that show how far it goes from what it was.
        samples: for a language model, prompts it goes on from at each stage.
        general: for a language model, data sets of general abilities, measured before the first task and after the
            last.
        answers: for a language model, whether answers are counted too: the likeliest label of rows that name their
            labels, what is written for others.
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
    backbone: Options = Field(default={})
    training: Options = Field(default={})
    methods: dict[str, MethodRow] = Field(min_length=1)
    default_methods: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    settings: dict[str, Setting] = Field(default={"standard": Setting()})
    default_setting: str = "standard"
    workers: PositiveInt = 1
    table: Literal["accuracy", "head_to_head", "language"] = "accuracy"
    reference: str | None = None
    claims: dict[str, ClaimSpec] = Field(default={})
    validation: ValidationSpec = ValidationSpec()
    retention: RetentionSpec | None = None
    samples: SamplesSpec | None = None
    general: tuple[DataSpec, ...] = ()
    answers: bool = False
    published: tuple[PublishedFigure, ...] = ()
    notes: str = ""

    @model_validator(mode="after")
    def _fits_its_scenario(self) -> Recipe:
        is_language = self.stream.scenario == "language"
        if is_language != (self.table == "language"):
            raise ValueError("needs table: language for stream.scenario: language, and for nothing else; change one")
        if not is_language and (self.retention or self.samples or self.general or self.answers):
            raise ValueError("measures retention, samples, general or answers, which only language models have")
        cuts = [self.stream.by, *(setting.stream.get("by", self.stream.by) for setting in self.settings.values())]
        if self.data.sets and set(cuts) != {"datasets"}:
            raise ValueError("has data.sets, of which only stream.by: datasets makes tasks; change one")
        if any(part.name is None for part in self.general):
            raise ValueError("has an entry without a name under general; give each data set a name")
        return self
