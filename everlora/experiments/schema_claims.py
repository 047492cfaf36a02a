"""What a recipe may claim, for a run to bear out or contradict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from everlora.experiments.schema_part import Part

__all__ = ["ClaimSpec", "Figure"]

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
    "ce",
    "ce_first",
    "ce_earlier",
    "ce_last",
    "learning_ce",
    "bwt_ce",
    "fwt_ce",
    "forgetting_ce",
    "retention",
    "bits_per_byte",
    "buffer_bytes",
    "answer_acc",
]


class ClaimSpec(Part):
    """A statement about two rows that a run can bear out or contradict.

    Attributes:
        claim: the statement, as somebody made it.
        test: what must hold, for each of `figures` and seed by seed: `greater` or `less` compares `row` with
            `against`; `near` wants the two within `margin` of each other; `only_zero` wants exactly 0 in `row`, and
            more than `margin` in `against`; `unchanged` wants the pretrained tensors and those of earlier tasks of
            `row` to stay as they were, bit for bit.
        row: the row it is about. Of a row whose method has several weights to predict with, `row/weights` means those,
            the row's name alone the usual ones.
        against: the row that it is compared with, or several: the claim is then about each of them that was run.
        figures: the numbers that decide, all of them.
        shown: numbers that are reported with it and decide nothing.
        margin: by how much `greater` and `less` may be missed, how near `near` is, and what `only_zero` asks of the
            other row.
        published: what is known of it from its source.
    """

    claim: str
    test: Literal["greater", "less", "near", "only_zero", "unchanged"]
    row: str
    against: str | tuple[str, ...] | None = None
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
        if self.test == "near" and not self.margin:
            raise ValueError("says that two rows are near each other, but not how near; add margin")
        return self

    @property
    def others(self) -> tuple[str, ...]:
        """The rows that it is compared with."""
        if self.against is None:
            return ()
        return (self.against,) if isinstance(self.against, str) else self.against

    @property
    def rows(self) -> tuple[str, ...]:
        """All rows that it speaks of, without the names of weights."""
        return tuple(name.partition("/")[0] for name in (self.row, *self.others))
