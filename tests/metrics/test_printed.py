"""The numbers other projects print, against the worked example and their known flaws."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from everlora.errors import OptionError, ShapeError
from everlora.metrics import CAVEATS, PROJECTS, STANDING_WARNING, AccuracyMatrix

NAN = float("nan")
COUNTS = np.array([[90, 20, 50, 5], [70, 80, 60, 8], [75, 84, 170, 10], [50, 86, 130, 48]])
SIZES = np.array([100, 100, 200, 50])
COLLAPSE = [[0.95, NAN], [0.45, 0.90]]


@pytest.fixture
def example() -> AccuracyMatrix:
    recognised = np.minimum(COUNTS + 2, SIZES)
    aware = np.minimum(COUNTS + 5, SIZES)
    return AccuracyMatrix.from_counts(
        COUNTS, SIZES, aware, recognised, individual=None, joint=None, baseline=[0.12, 0.10, 0.20, 0.08]
    )


def points(printed: dict[str, float | None], label: str) -> list[float | None]:
    return [value for name, value in printed.items() if name.startswith(f"{label} [")]


def falling(num_tasks: int) -> AccuracyMatrix:
    """Distinct accuracies, so that a mixed-up column shows."""
    values = np.full((num_tasks, num_tasks), NAN)
    for step in range(num_tasks):
        values[step, : step + 1] = [0.95 - 0.02 * task - 0.03 * (step - task) * (1 + task) for task in range(step + 1)]
    return AccuracyMatrix(values, [50] * num_tasks)


def test_every_mode_has_a_caveat_and_our_number_beside_it(example: AccuracyMatrix) -> None:
    assert set(CAVEATS) == set(PROJECTS)
    assert len(PROJECTS) == 8
    assert "mean" in STANDING_WARNING
    for project in PROJECTS:
        printed = example.as_printed_by(project)
        assert any(name.startswith("everlora ") for name in printed)
        assert all(value is None or isinstance(value, float) for value in printed.values())


def test_pilot_rounds_first_and_lets_the_last_row_compete(example: AccuracyMatrix) -> None:
    printed = example.as_printed_by("pilot", classes_per_task=10)
    assert points(printed, "CNN top1 curve") == [90.0, 75.0, 82.25, 69.78]
    assert printed["Average Accuracy (CNN)"] == pytest.approx((90 + 75 + 82.25 + 69.78) / 4, abs=1e-9)
    assert printed["Forgetting (CNN)"] == pytest.approx(20.0, abs=1e-9)
    assert printed["grouped 00-09"] == 50.0
    assert printed["grouped old"] == pytest.approx(66.5)  # 266 of 400
    assert printed["grouped new"] == 96.0
    assert printed["everlora forgetting"] == pytest.approx(58 / 3, abs=1e-9)


def test_pilot_omits_a_last_group_of_one_class() -> None:
    printed = falling(3).as_printed_by("pilot", classes_per_task=[4, 2, 1])
    assert "grouped 00-03" in printed
    assert "grouped 04-05" in printed
    assert "grouped 06-07" not in printed


def test_pilot_has_no_groups_for_other_streams() -> None:
    printed = falling(3).as_printed_by("pilot", classes_per_task=[4, 2, 3])
    assert not [name for name in printed if name.startswith("grouped")]


def test_libcontinual_on_the_worked_example(example: AccuracyMatrix) -> None:
    printed = example.as_printed_by("libcontinual")
    assert points(printed, "Forgetting") == pytest.approx([0, 0, 7.5, 34 / 3], abs=1e-9)
    assert points(printed, "Backward Transfer") == pytest.approx([0, 0, -5, -49 / 6], abs=1e-9)
    assert printed["Overall Frgt"] == pytest.approx((7.5 + 34 / 3) / 2, abs=1e-9)
    assert round(printed["Overall Frgt"] or 0, 4) == 9.4167
    assert round(printed["Overall BwT"] or 0, 4) == -6.5833
    assert printed["[Task] Last Average Acc"] == pytest.approx(74.25)
    assert printed["[Batch] Last Average Acc"] == pytest.approx(69.78)


def test_libcontinual_does_not_see_a_two_task_collapse() -> None:
    printed = AccuracyMatrix(COLLAPSE).as_printed_by("libcontinual")
    assert printed["Forgetting"] == 0.0
    assert printed["Backward Transfer"] == 0.0
    assert printed["everlora forgetting"] == pytest.approx(50.0, abs=1e-9)
    assert printed["everlora bwt"] == pytest.approx(-50.0, abs=1e-9)


def test_sdlora_mixes_up_tasks_beyond_a_hundred_classes() -> None:
    five, six = falling(5), falling(6)
    assert five.as_printed_by("sdlora", classes_per_task=20)["Forgetting (CNN)"] == pytest.approx(
        five.as_printed_by("pilot", classes_per_task=20)["Forgetting (CNN)"], abs=1e-12
    )
    printed = six.as_printed_by("sdlora", classes_per_task=20)
    pilot = six.as_printed_by("pilot", classes_per_task=20)["Forgetting (CNN)"]
    assert printed["forgetting (printed)"] == printed["Forgetting (CNN)"] != pytest.approx(pilot, abs=1e-3)
    assert printed["forgetting (column-aligned)"] == pilot


def test_sdlora_without_class_counts_cannot_say_what_was_printed() -> None:
    printed = falling(6).as_printed_by("sdlora")
    assert printed["forgetting (printed)"] is None
    assert printed["forgetting (column-aligned)"] is not None


def test_inflora_prints_three_curves_in_two_units(example: AccuracyMatrix) -> None:
    printed = example.as_printed_by("inflora")
    assert points(printed, "CNN top1 curve")[-1] == 69.78
    assert points(printed, "CNN top1 with task curve")[0] == 95.0
    assert points(printed, "CNN top1 task curve")[0] == pytest.approx(0.92)
    unequal = example.as_printed_by("inflora", classes_per_task=[50, 10, 10, 10])
    assert points(unequal, "CNN top1 task curve") == [None] * 4


def test_mammoth(example: AccuracyMatrix) -> None:
    printed = example.as_printed_by("mammoth")
    assert printed["[Class-IL]"] == pytest.approx(74.25)
    assert printed["Forgetting"] == pytest.approx(20.0)
    assert printed["Backward Transfer"] == pytest.approx(-18.0)
    assert printed["Forward Transfer"] == 0.0
    assert printed["everlora fwt"] == pytest.approx(32 / 3)


def test_avalanche_counts_future_tasks(example: AccuracyMatrix) -> None:
    printed = example.as_printed_by("avalanche")
    assert points(printed, "Top1_Acc_Stream") == pytest.approx([165 / 450, 218 / 450, 339 / 450, 314 / 450], abs=1e-9)
    assert points(printed, "StreamForgetting")[1:] == pytest.approx([0.20, 0.055, 0.18], abs=1e-9)
    assert printed["StreamBWT"] == pytest.approx(-0.18, abs=1e-9)
    assert points(printed, "ExperienceForgetting") == pytest.approx([0.40, -0.06, 0.20], abs=1e-9)
    assert points(printed, "Top1_Acc_Exp") == pytest.approx([0.50, 0.86, 0.65, 0.96], abs=1e-9)


def test_avalanche_without_cells_ahead_has_only_the_last_stream_accuracy() -> None:
    printed = AccuracyMatrix(COLLAPSE, [10, 30]).as_printed_by("avalanche")
    assert printed["Top1_Acc_Stream [1]"] is None
    assert printed["Top1_Acc_Stream"] == pytest.approx((4.5 + 27) / 40)


def test_trace_divides_by_the_number_of_tasks(example: AccuracyMatrix) -> None:
    printed = example.as_printed_by("trace")
    assert printed["OP"] == pytest.approx(74.25)
    assert printed["BWT"] == pytest.approx(-13.5, abs=1e-9)
    assert points(printed, "BWT")[:2] == [None, pytest.approx(-10.0)]


def test_easycl_takes_missing_cells_for_zero(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="everlora.metrics"):
        printed = AccuracyMatrix([[0.9, NAN, NAN], [NAN, 0.8, NAN], [0.6, 0.7, 0.9]]).as_printed_by("easycl")
    assert "3 cells" in caplog.text  # one in the past, two just above the diagonal
    assert printed["avg"] == pytest.approx((0.9 + 0.4 + 2.2 / 3) / 3)
    assert printed["everlora avg"] is None
    assert printed["bwt"] == pytest.approx(-0.2)


@pytest.mark.parametrize("project", PROJECTS)
def test_modes_stand_one_task_and_a_joint_run(project: str) -> None:
    one = AccuracyMatrix.from_counts([[7]], [10]).as_printed_by(project, classes_per_task=5)
    joint = AccuracyMatrix.from_counts([[-1, -1], [7, 6]], [10, 10]).as_printed_by(project, classes_per_task=5)
    for printed in (one, joint):
        assert all(value is None or np.isfinite(value) for value in printed.values())


def test_unknown_project_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="mammoth"):
        AccuracyMatrix(COLLAPSE).as_printed_by("mamoth")
    assert AccuracyMatrix(COLLAPSE).as_printed_by("SD-LoRA") == AccuracyMatrix(COLLAPSE).as_printed_by("sdlora")


@pytest.mark.parametrize("classes", [[10], [10, 0], 0])
def test_class_counts_must_fit(classes: int | list[int]) -> None:
    with pytest.raises(ShapeError, match="classes_per_task"):
        AccuracyMatrix(COLLAPSE).as_printed_by("pilot", classes_per_task=classes)
