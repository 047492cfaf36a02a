"""Accuracy against what a method adds to the network, with the task given and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everlora.report.charts import Scale
from everlora.report.scatter import ScatterChart, Spot, scatter_chart
from everlora.report.table import Row

__all__ = ["Family", "Growth", "growth"]

_CHARTS = (("til", "Accuracy with the task given (TIL)"), ("cil", "Accuracy without (CIL)"))


@dataclass(frozen=True)
class Family:
    """One entry of the legend."""

    name: str
    style: int


@dataclass(frozen=True)
class Growth:
    """The charts, and the legend where rows belong to families."""

    charts: list[ScatterChart]
    families: list[Family]


def growth(rows: Sequence[Row]) -> Growth | None:
    """Return the picture of accuracy against growth; None where sizes were not recorded or do not differ."""
    names = list(dict.fromkeys(row["family"] for row in rows if row["family"]))
    styles = {name: index for index, name in enumerate(names)}
    charts = [
        chart
        for figure, title in _CHARTS
        if (chart := scatter_chart(title, "accuracy %", _spots(rows, figure, styles), scale=Scale())) is not None
    ]
    return Growth(charts, [Family(name, style) for name, style in styles.items()]) if charts else None


def _spots(rows: Sequence[Row], figure: str, styles: dict[str, int]) -> list[Spot]:
    spots = []
    for place, row in enumerate(rows):
        size, value = row["figures"]["relative_size"]["mean"], row["figures"][figure]
        if size is not None and value["mean"] is not None:
            # A row without a family takes the style after those of the families, or its own where nothing has one.
            style = styles.get(row["family"] or "", len(styles)) if styles else place
            spots.append(Spot(row["label"], size, value["mean"], value["sd"], style))
    return spots
