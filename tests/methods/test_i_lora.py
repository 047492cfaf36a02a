"""I-LoRA: that the stable adapter really moves, what holds it and the plastic one together, and what is kept."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from everlora.errors import DataError, OptionError, TargetError, UnsupportedError
from everlora.methods import method_entry, method_spec
from everlora.methods.base import Batch, Share, TaskInfo
from everlora.methods.consistency import distance, numbered_layers
from everlora.methods.i_lora import ILoraOptions
from everlora.methods.rehearsal import joined, stack_rows
from everlora.training.pieces import split_step
from tests.methods.language_builders import LanguageBench, language_task, same


@pytest.fixture(scope="module")
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260K"


def _second_task(stories: Path, **options: Any) -> LanguageBench:
    """A method that has learned one task, its adapters apart, at the beginning of the second."""
    bench = LanguageBench(stories, "i_lora", 2, training={"epochs": 1}, **options)
    bench.learn(0)
    bench.begin(1)
    return bench


def _with_memory(bench: LanguageBench, rows: list[int], count: int) -> Batch:
    recalled = bench.method.recall(count, torch.Generator().manual_seed(3))
    return replace(bench.batch(1, rows), memory=bench.memory(recalled))


def _gradients(bench: LanguageBench, batches: list[Batch]) -> list[Tensor]:
    parameters = bench.method.parameters()["adapter"]
    for parameter in parameters:
        parameter.grad = None
    for batch in batches:
        (bench.method.loss(batch).value * batch.share.supervised).backward()
    return [p.grad.clone() for p in parameters]


# no-ops


def test_switched_off_it_is_plain_fine_tuning_bit_for_bit(stories: Path) -> None:
    off = LanguageBench(stories, "i_lora", use_ilora=False)
    plain = LanguageBench(stories, "sequential", rank=8, alpha=16)
    draws, logs = [], []
    for bench in (off, plain):
        torch.manual_seed(5)
        logs.append([report.log for report in bench.learn(0, 1, 2)])
        draws.append(torch.rand(3))
    assert same(off.factors(), plain.factors()) and logs[0] == logs[1] and torch.equal(*draws)
    assert off.method.rehearsal is None and off.method.variants == () and off.method.panels() == {}
    assert not any(key.startswith(("buffer/", "tasks/002/stable")) for key in off.method.state())


def test_without_weight_the_plastic_adapter_is_that_of_replay_bit_for_bit(stories: Path) -> None:
    mine = LanguageBench(stories, "i_lora", consistency_weight=0, inference_adapter="plastic", ilora_buffer_size=9)
    replay = LanguageBench(stories, "replay", rank=8, alpha=16, size=9)
    logs = [[report.log for report in bench.learn(0, 1, 2)] for bench in (mine, replay)]
    assert same(mine.factors(), replay.factors()) and logs[0] == logs[1]
    assert mine.method.rehearsal.buffer == replay.method.buffer and len(replay.method.buffer) == 9
    assert torch.equal(mine.logits(0), replay.logits(0))
    assert not torch.equal(mine.logits(0), mine.logits(0, "stable"))


# the moving average


def test_each_update_moves_the_stable_adapter_and_nothing_else(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", ema_alpha=0.5)
    base, seen = bench.base(), []
    update = bench.method.after_step

    def watched(stepped: bool) -> None:
        before, plastic, updates = bench.stable(), bench.factors(), bench.method.average.updates
        update(stepped)
        after, kept = bench.stable(), min(1 - 1 / (updates + 1), 0.5)
        assert same(plastic, bench.factors())
        for name, value in after.items():
            wanted = kept * before[name].double() + (1 - kept) * plastic[name].double()
            torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-7)
        seen.append(any(not torch.equal(value, before[name]) for name, value in after.items()))

    bench.method.after_step = watched
    bench.learn(0, 1)
    assert seen and all(seen) and bench.method.average.updates == len(seen) == 8
    assert same(base, bench.base())
    assert all(not p.requires_grad for p in bench.method.stable.parameters())


def test_warm_up_copies_first_and_then_is_the_mean_of_all_iterates(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", ema_alpha=0.999)
    iterates: list[dict[str, Tensor]] = []
    update = bench.method.after_step

    def watched(stepped: bool) -> None:
        iterates.append(bench.factors())
        update(stepped)
        if len(iterates) == 1:
            assert same(bench.stable(), iterates[0])

    bench.method.after_step = watched
    bench.learn(0, 1, 2)
    for name, value in bench.stable().items():
        mean = torch.stack([iterate[name].double() for iterate in iterates]).mean(dim=0)
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)


def test_retention_of_one_stands_still_and_of_zero_copies(stories: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing moves is worth a warning, see below
        still = LanguageBench(stories, "i_lora", ema_alpha=1, ema_warmup=False)
        still.begin(0)
        before = still.stable()
        still = LanguageBench(stories, "i_lora", ema_alpha=1, ema_warmup=False)
        still.learn(0, 1)
    assert same(before, still.stable()) and not same(before, still.factors())
    close = LanguageBench(stories, "i_lora", ema_alpha=0, ema_warmup=False)
    close.learn(0, 1)
    assert same(close.stable(), close.factors())


def test_updates_are_counted_on_over_tasks(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 2)
    bench.learn(0)
    before, updates = bench.stable(), bench.method.average.updates
    bench.begin(1)
    assert same(before, bench.stable()) and bench.method.average.updates == updates == 4
    bench.method.before_step(torch.tensor([0, 1]))
    bench.method.parameters()["adapter"][0].data.add_(1.0)
    bench.method.after_step(True)
    assert not same(bench.stable(), bench.factors()), "the first update of a later task is no copy"


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_one_update_for_each_optimiser_step(stories: Path, pieces: int) -> None:
    bench = LanguageBench(stories, "i_lora", 2, training={"micro_batches": pieces})
    steps = sum(report.steps for report in bench.learn(0, 1))
    assert bench.method.average.updates == steps == 8
    bench.method.after_step(False)
    assert bench.method.average.updates == steps, "a skipped step counts for nothing"


def test_the_horizon_sets_the_retention_by_the_length_of_the_task(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 1, ema_horizon=0.5)
    bench.begin(0, steps=40)
    assert bench.method.average.ema_alpha == pytest.approx(1 - 1 / 20)
    with pytest.raises(OptionError, match="number of steps"):
        LanguageBench(stories, "i_lora", 1, ema_horizon=0.5).begin(0, steps=0)


def test_a_retention_too_slow_for_the_task_is_said_once(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 2, ema_warmup=False)
    with pytest.warns(UserWarning, match=r"100% of the stable adapter .* 4 steps"):
        bench.begin(0)
    bench.begin(1)  # warnings are errors


def test_a_task_may_start_from_the_stable_adapter(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 2, plastic_init="from_stable")
    bench.learn(0)
    assert not same(bench.stable(), bench.factors())
    bench.begin(1)
    assert same(bench.stable(), bench.factors())


def test_the_gate(stories: Path) -> None:
    never = LanguageBench(stories, "i_lora", 2, selective_update=True, min_update_threshold=1e9)
    iterates: list[dict[str, Tensor]] = []
    update = never.method.after_step
    never.method.after_step = lambda stepped: (iterates.append(never.factors()), update(stepped))
    never.learn(0, 1)
    assert same(never.stable(), iterates[0]) and never.method.average.updates == 1
    assert never.method.panels()["gate_open_rate"] == {"gate": 0.0}
    always = LanguageBench(stories, "i_lora", 2, selective_update=True, min_update_threshold=-math.inf)
    without = LanguageBench(stories, "i_lora", 2)
    for bench in (always, without):
        bench.learn(0, 1)
    for name, value in always.stable().items():  # the stable pass takes other rows along, which changes its rounding
        torch.testing.assert_close(value, without.stable()[name], rtol=1e-3, atol=1e-4)
    assert always.method.average.updates == without.method.average.updates
    assert always.method.panels()["gate_open_rate"] == {"gate": 1.0}


@pytest.mark.parametrize("pieces", [1, 2])
def test_the_gate_measures_the_gain_over_the_whole_step(stories: Path, pieces: int) -> None:
    bench = LanguageBench(stories, "i_lora", 2, training={"epochs": 1, "micro_batches": pieces}, selective_update=True)
    bench.learn(0)
    sums: list[list[float]] = []
    after, add = bench.method.average.after_step, bench.method.processes.sum
    assert add(torch.ones(1)) == 1
    bench.method.average.after_step = lambda stable, losses, total: (
        sums.append(losses.tolist()),
        after(stable, losses, total),
    )
    expected = []
    before = bench.method.before_step

    def watched(rows: Tensor) -> None:
        before(rows)
        if not expected:
            batch = bench.batch(1, rows.tolist())
            bench.backbone.train(True)
            losses = []
            for variant in ("stable", "plastic"):
                with torch.no_grad(), bench.method.predicting(variant):
                    scores = bench.method.logits(batch)[:, :-1].flatten(0, 1)
                losses.append(float(functional.cross_entropy(scores, batch.labels[:, 1:].flatten(), reduction="sum")))
            expected.append(losses)

    bench.method.before_step = watched
    bench.method.recall = lambda count, generator: None
    bench.learn(1)
    assert sums[0] == pytest.approx(expected[0], rel=1e-5)


# the loss


def test_the_loss_is_the_formula(stories: Path) -> None:
    bench = _second_task(stories, hidden_state_layers=(-1, 2), consistency_weight=0.7)
    batch = _with_memory(bench, [0, 1, 2], 3)
    memory, model, method = batch.memory, bench.backbone, bench.method
    total, count = 0.0, 0
    for part in (batch, memory):
        scores = method.logits(part)[:, :-1].flatten(0, 1)
        wanted = part.labels[:, 1:].flatten()
        total += functional.cross_entropy(scores, wanted, reduction="sum").item()
        count += int((wanted != -100).sum())
    plastic = [h.detach() for h in model.hidden_states(memory.inputs, [5, 2])]
    with torch.no_grad(), method.predicting("stable"):
        stable = model.hidden_states(memory.inputs, [5, 2])
    mask = memory.inputs["attention_mask"].bool()
    moved = sum(float((p - s)[mask].square().sum()) for p, s in zip(plastic, stable, strict=True))
    moved /= 2 * int(mask.sum()) * 64
    loss = method.loss(batch)
    assert float(loss.value.detach()) == pytest.approx(total / count + 0.7 * moved, rel=1e-5)
    assert loss.terms["cross_entropy"] == pytest.approx(total / count, rel=1e-5)
    assert loss.terms["consistency"] == pytest.approx(moved, rel=1e-3) and moved > 0


def test_the_distance_is_zero_only_between_equal_adapters(stories: Path) -> None:
    bench = _second_task(stories)
    batch = _with_memory(bench, [0, 1], 2)
    assert bench.method.loss(batch).terms["consistency"] > 0
    bench.method.stable.follow(0.0)
    assert bench.method.loss(batch).terms["consistency"] < 1e-10  # to the rounding of a pass over more rows
    every = _second_task(stories, consistency_rows="all")
    every.method.stable.follow(0.0)
    assert every.method.loss(_with_memory(every, [0, 1], 2)).terms["consistency"] == 0.0


def test_one_sided_counts_no_more_than_squares() -> None:
    torch.manual_seed(0)
    student, teacher = [torch.randn(2, 3, 4)], [torch.randn(2, 3, 4)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    both, one = (distance(student, teacher, mask, mode) for mode in ("mse", "one_sided"))
    kept = (teacher[0] - student[0])[mask]
    assert both == pytest.approx(float(kept.square().mean())) and 0 < one < both
    assert one == pytest.approx(float(kept.clamp(min=0).square().mean()))
    assert float(distance(student, teacher, torch.zeros_like(mask), "mse")) == 0


def test_the_distance_has_no_gradient_to_the_stable_adapter_and_none_on_current_rows(stories: Path) -> None:
    bench = _second_task(stories)
    batch = _with_memory(bench, [0, 1], 2)
    loss = bench.method.loss(batch)
    loss.value.backward()
    assert all(p.grad is None for p in bench.method.stable.parameters())
    other = bench.method.loss(replace(bench.batch(1, [4, 5]), memory=batch.memory))
    assert other.terms["consistency"] == pytest.approx(loss.terms["consistency"], rel=1e-4)
    assert other.terms["cross_entropy"] != pytest.approx(loss.terms["cross_entropy"], rel=1e-2)


def test_nothing_is_compared_without_memory_or_weight(stories: Path) -> None:
    bench = _second_task(stories)
    assert bench.method.loss(bench.batch(1, [0, 1])).terms == {}
    none = LanguageBench(stories, "i_lora", 2, replay_ratio=0)
    none.learn(0)
    none.begin(1)
    assert none.method.recall(4, torch.Generator()) is None
    with pytest.warns(UserWarning, match="ilora_buffer_size=0"):
        empty = LanguageBench(stories, "i_lora", 2, ilora_buffer_size=0)
    empty.learn(0, 1)
    assert empty.method.rehearsal is None and "buffer_rows" not in empty.method.panels()


@pytest.mark.parametrize("fused", [True, False])
def test_padding_changes_neither_part(stories: Path, fused: bool) -> None:
    bench = _second_task(stories)
    batch = _with_memory(bench, [0, 1, 2], 3)
    assert len(joined(batch, 1)) == 1
    terms = bench.method.loss(batch).terms

    def padded(part: Batch, width: int) -> Batch:
        fill = {"labels": -100}
        grown = {
            name: functional.pad(value, (0, width - value.shape[1]), value=fill.get(name, 0))
            for name, value in {**part.inputs, "labels": part.labels}.items()
        }
        return replace(part, inputs={k: v for k, v in grown.items() if k != "labels"}, labels=grown["labels"])

    assert batch.memory is not None
    # a memory of much longer rows takes a pass of its own
    wider = replace(batch, memory=padded(batch.memory, 60 if not fused else batch.memory.labels.shape[1] + 2))
    assert len(joined(wider, 1)) == (1 if fused else 2)
    again = bench.method.loss(wider).terms
    assert again == pytest.approx(terms, abs=1e-4)


def test_one_pass_gives_what_two_give(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _second_task(stories)
    batch = _with_memory(bench, [0, 1, 2], 3)
    fused, found = bench.method.loss(batch), _gradients(bench, [batch])
    monkeypatch.setattr("everlora.methods.rehearsal._MAX_PADDING", 0.0)
    assert len(joined(batch, 1)) == 2
    apart, again = bench.method.loss(batch), _gradients(bench, [batch])
    assert float(fused.value.detach()) == pytest.approx(float(apart.value.detach()), abs=1e-5)
    for mine, theirs in zip(found, again, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_packed_rows_and_whole_rows_of_the_memory(stories: Path, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = _second_task(stories)
    plain = _with_memory(bench, [0, 1, 2], 3)
    packed = replace(bench.batch(1, [0, 1, 2], pack=True), memory=plain.memory)
    assert len(packed.labels) < 3
    monkeypatch.setattr("everlora.methods.rehearsal._MAX_PADDING", 99.0 if fused else 0.0)
    assert len(joined(packed, 1)) == (1 if fused else 2)
    terms = bench.method.loss(plain).terms
    assert bench.method.loss(packed).terms == pytest.approx(terms, rel=1e-4)
    current = _second_task(stories, consistency_rows="current", consistency_tokens="supervised")
    terms = [current.method.loss(part).terms["consistency"] for part in (plain, packed)]
    assert terms[0] == pytest.approx(terms[1], rel=1e-4) and terms[0] > 0


@pytest.mark.parametrize("fused", [True, False])
def test_packed_rows_and_the_padding_of_the_memory(stories: Path, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everlora.methods.rehearsal._MAX_PADDING", 99.0 if fused else 0.0)
    bench = _second_task(stories, consistency_tokens="all")
    batch = replace(bench.batch(1, [0, 1, 2], pack=True), memory=_with_memory(bench, [0, 1, 2], 3).memory)
    assert not bool(batch.memory.inputs["attention_mask"].all()), "there is padding to compare"
    assert bench.method.loss(batch).terms["consistency"] > 1e-6
    bench.method.stable.follow(0.0)
    assert bench.method.loss(batch).terms["consistency"] < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"consistency_tokens": "supervised"},
        {"consistency_rows": "current"},
        {"consistency_rows": "all", "consistency_tokens": "supervised", "hidden_state_layers": "all"},
        {"ce_reduction": "mean_of_means"},
        {"consistency_mode": "one_sided"},
    ],
)
@pytest.mark.parametrize("count", [2, 3])
def test_pieces_of_a_step_add_up_to_the_whole(stories: Path, options: dict[str, Any], count: int) -> None:
    _check_pieces(stories, options, count)


def test_pieces_of_a_packed_step_add_up_with_the_padding_of_the_memory(stories: Path) -> None:
    _check_pieces(stories, {"consistency_tokens": "all"}, 3, pack=True)


def _check_pieces(stories: Path, options: dict[str, Any], count: int, *, pack: bool = False) -> None:
    bench = _second_task(stories, consistency_weight=3.0, **options)
    rows = torch.arange(6)
    bench.method.before_step(rows)
    recalled = bench.method.recall(2, torch.Generator().manual_seed(0))
    pieces = split_step(bench.backbone, bench.data[1].encoded, rows, recalled, count)
    assert len(pieces) == count and not all(len(piece.memory) for piece in pieces) == (count == 3)
    memory = bench.memory(recalled)

    def of(piece: Any) -> Batch:
        batch = replace(bench.batch(1, piece.rows.tolist(), pack=pack), share=piece.share)
        if not len(piece.memory):
            return batch
        mine = Batch(
            {name: value[piece.memory] for name, value in memory.inputs.items()},
            memory.labels[piece.memory],
            tasks=memory.tasks[piece.memory],
        )
        return replace(batch, memory=mine)

    whole = _gradients(bench, [replace(bench.batch(1, rows.tolist(), pack=pack), memory=memory)])
    parts = _gradients(bench, [of(piece) for piece in pieces])
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)


def test_a_piece_needs_its_step(stories: Path) -> None:
    bench = _second_task(stories, consistency_rows="all")
    batch = replace(_with_memory(bench, [0], 1), share=Share(0.5, 0.5))
    bench.method.after_step(False)
    with pytest.raises(UnsupportedError, match="before_step"):
        bench.method.loss(batch)


def test_layers_are_numbered_from_both_ends() -> None:
    assert numbered_layers((-1,), 5) == (5,)
    assert numbered_layers((-1, 5, 0, -6), 5) == (0, 5)
    assert numbered_layers("all", 2) == (0, 1, 2)
    for wrong in ((6,), (-7,), ()):
        with pytest.raises(OptionError, match=r"from -6 to 5"):
            numbered_layers(wrong, 5)


def test_what_a_step_costs(stories: Path) -> None:
    tokens: list[tuple[int, bool]] = []

    def measure(name: str, **options: Any) -> tuple[int, int]:
        bench = LanguageBench(stories, name, 2, training={"epochs": 1, "batch_size": 8}, **options)
        bench.learn(0)
        bench.begin(1)
        recalled = bench.method.recall(8, torch.Generator())
        batch = replace(bench.batch(1, list(range(8))), memory=bench.memory(recalled))
        tokens.clear()
        body = bench.backbone.model.model
        hook = body.register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append((len(kwargs["input_ids"]), torch.is_grad_enabled())),
            with_kwargs=True,
        )
        head = bench.backbone.output_head.register_forward_pre_hook(
            lambda module, args: tokens.append((0, torch.is_grad_enabled()))
        )
        bench.method.loss(batch)
        hook.remove()
        head.remove()
        assert sum(rows == 0 for rows, _ in tokens) == 1, "one pass through the output layer"
        return tuple(sum(rows for rows, trains in tokens if trains is wanted) for wanted in (True, False))  # type: ignore[return-value]

    assert measure("replay") == (16, 0)
    assert measure("i_lora") == (16, 8)  # forward and backward of 16 rows, forward of 8: 1.25 times as much
    assert measure("i_lora", consistency_weight=0) == (16, 0)


@pytest.mark.parametrize("raises", [True, False])
def test_a_flip_leaves_no_trace(stories: Path, raises: bool) -> None:
    bench = _second_task(stories, lora_dropout=0.3)
    batch = _with_memory(bench, [0, 1], 2)
    own = {name: (layer.down, layer.up, layer.dropout, layer.training) for name, layer in bench.method.layers().items()}
    flags = [p.requires_grad for p in bench.backbone.model.parameters()]
    hidden = bench.backbone.hidden_states

    def failing(*arguments: Any) -> Any:
        assert all(layer.dropout == 0 for layer in bench.method.layers().values()), "the stable pass comes first"
        raise DataError("stop")

    bench.backbone.hidden_states = failing if raises else hidden
    if raises:
        with pytest.raises(DataError, match="stop"):
            bench.method.loss(batch)
    else:
        bench.method.loss(batch)
    for name, layer in bench.method.layers().items():
        down, up, dropout, training = own[name]
        assert layer.down is down and layer.up is up and (layer.dropout, layer.training) == (dropout, training)
    assert flags == [p.requires_grad for p in bench.backbone.model.parameters()]


def test_dropout_is_that_of_the_plastic_adapter_alone(stories: Path) -> None:
    bench = _second_task(stories, lora_dropout=0.5)
    assert {layer.dropout for layer in bench.method.layers().values()} == {0.5}
    batch = _with_memory(bench, [0, 1], 2)
    bench.method.stable.follow(0.0)
    assert bench.method.loss(batch).terms["consistency"] > 0
    bench.backbone.eval()
    assert bench.method.loss(batch).terms["consistency"] < 1e-10


def test_no_row_gives_a_loss_that_is_no_number(stories: Path) -> None:
    long = language_task(0, 4, longest=80)  # rows longer than the model takes lose the start of their prompt
    bench = LanguageBench(stories, "i_lora", data=[long, language_task(1, 4)], training={"batch_size": 1, "epochs": 1})
    assert bench.data[0].encoded.num_truncated > 0
    reports = bench.learn(0, 1)
    assert all(math.isfinite(row["loss"]) for report in reports for row in report.log)


# the memory


@pytest.mark.parametrize("insert", ["task_end", "online"])
def test_rows_go_by_once(stories: Path, insert: str) -> None:
    bench = LanguageBench(stories, "i_lora", 2, training={"epochs": 3}, buffer_insert=insert, ilora_buffer_size=10)
    sizes = []
    after = bench.method.after_step
    bench.method.after_step = lambda stepped: (after(stepped), sizes.append(len(bench.method.rehearsal.buffer)))
    bench.learn(0)
    assert set(sizes) == ({0} if insert == "task_end" else {4, 8})
    bench.learn(1)
    buffer = bench.method.rehearsal.buffer
    assert len(buffer) == 10 and buffer.num_seen == 16
    assert buffer.state()["rows/token_ids"].dtype == torch.uint16


def test_every_step_inserts_again(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 1, training={"epochs": 3}, buffer_insert="every_step")
    bench.learn(0)
    assert bench.method.rehearsal.buffer.num_seen == 24


def test_balanced_shares_the_room_among_tasks(stories: Path) -> None:
    sizes = (4, 12, 8)
    data = [language_task(index, size) for index, size in enumerate(sizes)]
    bench = LanguageBench(
        stories, "i_lora", data=data, training={"epochs": 1}, buffer_policy="balanced", ilora_buffer_size=11
    )
    bench.learn(0, 1, 2)
    assert sorted(bench.method.panels()["buffer_rows"].values()) == [3.0, 4.0, 4.0]


def test_how_many_rows_come_back(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 3, training={"epochs": 1}, replay_ratio=0.5, replay_per_task=True)
    bench.learn(0, 1)
    bench.begin(2)
    assert len(bench.method.recall(4, torch.Generator()).labels) == 4
    few = LanguageBench(stories, "i_lora", 2, training={"epochs": 1}, replay_ratio=1.5, ilora_buffer_size=5)
    few.learn(0)
    few.begin(1)
    assert len(few.method.recall(2, torch.Generator()).labels) == 3
    assert len(few.method.recall(8, torch.Generator()).labels) == 5


# options


def test_documented_defaults_and_the_name_that_switches_it_on() -> None:
    options = ILoraOptions()
    assert (options.use_ilora, options.ema_alpha, options.consistency_weight) == (False, 0.999, 1.0)
    assert (options.ilora_buffer_size, options.selective_update, options.min_update_threshold) == (500, False, 0.1)
    assert options.hidden_state_layers == (-1,) and options.save_ema_adapter and options.inference_adapter == "stable"
    assert (options.rank, options.alpha, options.lora_dropout, options.targets) == (8, 16.0, 0.0, None)
    for name in ("ema_adapter_path", "previous_task_model", "current_task_id", "prev_task_id", "ema_horizon"):
        assert getattr(options, name) is None
    assert method_spec("ilora").options({}).use_ilora
    assert method_entry("ilora").name == "i_lora" and "fast adapter" in method_entry("i_lora").summary


def test_presets_set_defaults_that_options_override() -> None:
    published = method_spec("i_lora").options({"preset": "llmcl_effective", "alpha": 4})
    assert (published.alpha, published.lora_dropout, published.ce_reduction) == (4, 0.1, "mean_of_means")
    assert published.hidden_state_layers == "all" and published.targets == ("attention",)
    easy = method_spec("i_lora").options({"preset": "easycl", "hidden_state_layers": [-1]})
    assert easy.hidden_state_layers == (-1,) and easy.consistency_rows == "all" and easy.replay_ratio == 0.3
    assert ILoraOptions(preset="paper") == replace(ILoraOptions(), preset="paper")


@pytest.mark.parametrize("preset", ["llmcl_effective", "easycl"])
def test_what_the_public_codes_compute(stories: Path, preset: str) -> None:
    bench = LanguageBench(stories, "i_lora", 2, preset=preset, training={"epochs": 1})
    linear = {"llmcl_effective": 4, "easycl": 7}[preset]
    assert len(bench.method.layers()) == 5 * linear
    bench.learn(0)
    assert same(bench.stable(), bench.factors()), "a copy at the end of the task"
    before = bench.stable()
    done: list[bool] = []
    end = bench.method.end_task
    bench.method.end_task = lambda task, collect: (done.append(same(before, bench.stable())), end(task, collect))
    bench.learn(1)
    assert done == [True] and same(bench.stable(), bench.factors()) and not same(before, bench.stable())
    assert bench.method.variants[0] == "plastic"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("embed_tokens",)}, "vocabulary"),
        ({"targets": ("lm_head",)}, "vocabulary"),
        ({"targets": ("q_proj", "re:.*head")}, "vocabulary"),
        ({"targets": ("nothing_like_it",)}, "matches no layer"),
    ],
)
def test_targets_that_are_refused(stories: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        LanguageBench(stories, "i_lora", 1, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"ema_alpha": 1.5},
        {"min_update_threshold": math.nan},
        {"preset": "mine"},
        {"hidden_state_layers": (9,)},
        {"ema_adapter_path": "../elsewhere"},
        {"ema_adapter_path": "plastic"},
        {"ema_adapter_path": "/full/path"},
        {"prev_task_id": "task-000"},
    ],
)
def test_options_that_are_refused(stories: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options)).split("_")[0]):
        LanguageBench(stories, "i_lora", 1, **options)


def test_variants(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 1)
    bench.learn(0)
    assert bench.method.variants == ("stable", "plastic")
    assert torch.equal(bench.logits(0), bench.logits(0, "stable"))
    assert not torch.equal(bench.logits(0, "stable"), bench.logits(0, "plastic"))
    with pytest.raises(OptionError, match="no adapter 'stabel'"), bench.method.predicting("stabel"):
        pass
    off = LanguageBench(stories, "i_lora", 1, use_ilora=False)
    with pytest.raises(OptionError, match="no adapter 'stable'"), off.method.predicting("stable"):
        pass


def test_ids_of_tasks(stories: Path) -> None:
    bench = LanguageBench(stories, "i_lora", 2, training={"epochs": 1})
    bench.learn(0, 1)
    entries = bench.method.state()["history"]
    assert [entry["id"] for entry in entries] == ["task-000", "task-001"]
    assert entries[0] == {"id": "task-000", "steps": 2, "examples": 8}
    assert bench.method.state()["tasks/001/task_id"] == "task-001"
    named = LanguageBench(stories, "i_lora", 2, training={"epochs": 1}, current_task_id="news")
    named.learn(0)
    with pytest.raises(OptionError, match="'news' was learned before"):
        named.learn(1)


def test_only_a_begun_task_has_steps() -> None:
    assert TaskInfo(0, "a", (), 1).steps == 0
    assert torch.equal(stack_rows([torch.ones(1, 2), torch.zeros(1, 1)], -100), torch.tensor([[1.0, 1], [0, -100]]))
