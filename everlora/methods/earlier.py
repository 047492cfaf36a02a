"""Going on from what an earlier run left in a folder: what a method may ask for, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from everlora.methods.base import State

__all__ = ["ContinuesEarlierModel", "EarlierFolders", "EarlierModel"]

Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class EarlierFolders:
    """Where an earlier model lies.

    Attributes:
        model: a learner's directory, the folder of one of its tasks, a folder with adapters in folders of their own,
            or a plain PEFT adapter.
        adapter: name of the folder below, in which the adapter that is trained lies.
        second: folders in which the adapter beside it may lie, in the order to look: below that folder, or absolute.
    """

    model: str
    adapter: str
    second: tuple[str, ...]


@dataclass(frozen=True)
class EarlierModel:
    """What was found.

    Attributes:
        source: where, for messages.
        adapter: factors by layer, as stored.
        scales: what they count with, alpha over rank, by layer.
        second: factors of the adapter beside it; None where there is none.
        second_scales: the same for these.
        carried: what the earlier method carried on; empty where the folder holds none.
        is_plain: whether the folder holds nothing but one adapter.
        tried: folders in which the second adapter was looked for.
    """

    source: str
    adapter: Factors
    scales: Mapping[str, float]
    second: Factors | None = None
    second_scales: Mapping[str, float] = field(default_factory=dict)
    carried: State = field(default_factory=dict)
    is_plain: bool = False
    tried: tuple[str, ...] = ()


class ContinuesEarlierModel(ABC):
    """A method that can go on from what an earlier run left; whoever makes it reads the files for it."""

    path_options: ClassVar[tuple[str, ...]] = ()
    """Options that name a file or folder, which must hold wherever the program runs next."""

    @abstractmethod
    def earlier_folders(self) -> EarlierFolders | None:
        """The folders that the method's options name; None without any."""

    @abstractmethod
    def continue_from(self, earlier: EarlierModel) -> None:
        """Go on from there, on a newly made method.

        Raises:
            OptionError: what was found contradicts the options.
            StoreError: something is missing.
            TargetError: adapters of other layers.
            ShapeError: adapters of another rank.
        """
