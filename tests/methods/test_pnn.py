"""Progressive networks: growth, laterals by hand, nothing forgotten to the bit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from everlora import Learner
from everlora.errors import OptionError, UnsupportedError
from everlora.isolation.columns import Lateral, block_sites
from everlora.methods import method_spec
from everlora.methods.base import TaskInfo
from everlora.training.passes import Collector
from tests.methods.isolation_builders import KINDS, Bench, begin_and_end, deep_resnet, examples, save_kind
from tests.toy import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_kind(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize(("blocks", "total"), [(3, 2_956_555), (5, 4_900_875)])
def test_ten_columns_have_the_parameters_of_the_formula(blocks: int, total: int) -> None:
    backbone = deep_resnet(blocks)
    spec = method_spec("pnn")
    method = spec.method_class(spec.options({}), backbone, seed=1)
    begin_and_end(method, backbone, 10)
    assert method.stored_parameters() == total


def test_sites_are_stages_or_blocks_evenly_spaced(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {kind: block_sites(Bench(kind, folders[kind], "ncm", {}).backbone.model) for kind in KINDS}
    assert found["resnet"] == ("layer2", "layer3")
    assert len(found["vit"]) == len(found["bert"]) == 1 and found["bert"] == ("encoder.layer.1",)
    deep = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(12)))
    assert block_sites(torch.nn.ModuleDict({"blocks": deep})) == ("blocks.3", "blocks.6", "blocks.9")


def test_a_lateral_is_the_formula_and_starts_at_nothing() -> None:
    lateral = Lateral(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert ((lateral.alpha >= 0) & (lateral.alpha <= 0.1)).all() and lateral.reduce.abs().max() <= 6**-0.5
    older = [torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)]
    assert not lateral(older).any() and lateral(older).shape == (4, 5, 6, 6)
    torch.nn.init.normal_(lateral.project)
    joined = torch.cat([lateral.alpha[0] * older[0], lateral.alpha[1] * older[1]], dim=1)
    hidden = torch.relu(torch.einsum("oi,nihw->nohw", lateral.reduce, joined))
    expected = torch.einsum("oi,nihw->nohw", lateral.project, hidden)
    torch.testing.assert_close(lateral(older), expected, rtol=0, atol=1e-5)
    tokens = [h.flatten(2).transpose(1, 2) for h in older]  # the same map on channels that stand last
    torch.testing.assert_close(lateral(tokens), expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)


def test_the_second_column_is_computed_as_the_formula_says(folders: dict[str, Path]) -> None:
    bench = Bench("resnet", folders["resnet"], "pnn", {})
    method = bench.method
    bench.learn(0)
    bench.learn(1)
    for lateral in method._laterals[1].values():
        torch.nn.init.normal_(lateral.project, std=0.5)
    first, second = (method.task_modules.version(index) for index in (0, 1))
    x = bench.batch(1).inputs["pixel_values"]

    def stem(column: dict[str, torch.nn.Module]) -> torch.Tensor:
        return column["layer1"](torch.relu(column["bn1"](column["conv1"](x))))

    def beside(site: str, h: torch.Tensor) -> torch.Tensor:
        lateral = method._laterals[1][site]
        maps = [w[:, :, None, None] for w in (lateral.reduce, lateral.project)]
        return functional.conv2d(torch.relu(functional.conv2d(lateral.alpha[0] * h, maps[0])), maps[1])

    with torch.no_grad():
        old2, new2 = stem(first), stem(second)
        old3 = first["layer2"](old2)
        new3 = second["layer2"](new2 + beside("layer2", old2))
        pooled = first["layer3"](old3).mean(dim=(2, 3))
        features = second["layer3"](new3 + beside("layer3", old3)).mean(dim=(2, 3))
        head = method._laterals[1]["head"]
        logits = method.heads.linears[1](features)
        logits = logits + torch.relu(head.alpha[0] * pooled @ head.reduce.T) @ head.project.T
    torch.testing.assert_close(bench.logits(1, 1), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_column_starts_as_the_pretrained_network(kind: str, folders: dict[str, Path]) -> None:
    bench = Bench(kind, folders[kind], "pnn", {})
    bench.learn(0)
    method, data = bench.method, bench.data(1)
    info = TaskInfo(1, "task 1", (2, 3), len(data))
    method.begin_task(info, Collector(bench.trainer, info, data, None))
    scores = bench.logits(1, 1)
    method.activate(None)
    with torch.no_grad():
        features = bench.backbone.features(bench.batch(1).inputs)
    assert torch.equal(scores, method.heads.linears[1](features))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_forgotten_to_the_bit_and_a_reopened_learner_says_the_same(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    learner = Learner.create(
        tmp_path / "learner", folders[kind], "pnn", "task_incremental", epochs=2, batch_size=8, lr=5e-3, augment="none",
        optimizer="adamw", weight_decay=0.1,
    )  # fmt: skip
    rows = [examples(kind, index) for index in range(3)]
    early = []
    for index, part in enumerate(rows):
        learner.learn(part, name=f"task {index}")
        early.append([p.scores for p in learner.predict(part, task=index)])
    assert [[p.scores for p in learner.predict(part, task=index)] for index, part in enumerate(rows)] == early
    assert any(lateral.project.abs().sum() > 0 for lateral in learner.method._laterals[2].values())
    again = Learner.open(tmp_path / "learner")
    assert [[p.scores for p in again.predict(part, task=index)] for index, part in enumerate(rows)] == early
    again.learn(examples(kind, 3), name="task 3")
    digest = again.digest
    again.rollback(3)
    learner = Learner.open(tmp_path / "learner")
    learner.learn(examples(kind, 3), name="task 3")
    assert learner.digest == digest


@pytest.mark.parametrize("kind", KINDS)
def test_older_columns_keep_no_gradient_and_every_new_part_gets_one(kind: str, folders: dict[str, Path]) -> None:
    bench = Bench(kind, folders[kind], "pnn", {}, epochs=1)
    bench.learn(0)
    bench.learn(1)
    method = bench.method
    parts = [*method.task_modules.version(1).values(), *method._laterals[1].values(), method.heads.heads[1]]
    for part in parts:
        part.requires_grad_(True)
        part.zero_grad()
    method.loss(bench.batch(1)).value.backward()
    assert all(p.grad is None for part in method.task_modules.version(0).values() for p in part.parameters())
    for lateral in method._laterals[1].values():
        assert all(p.grad is not None and p.grad.any() for p in lateral.parameters())


def test_all_columns_at_once_equal_each_alone(folders: dict[str, Path]) -> None:
    bench = Bench("bert", folders["bert"], "pnn", {}, epochs=1)
    for index in range(3):
        bench.learn(index)
    method, batch = bench.method, bench.batch(1)
    bench.backbone.eval()
    with torch.no_grad():
        together = method._head_rows_of_all(batch)
        assert all(torch.equal(rows, method._head_rows_of(batch, index)) for index, rows in enumerate(together))


def test_tasks_are_recognised_by_the_first_column(folders: dict[str, Path]) -> None:
    bench = Bench("vit", folders["vit"], "pnn", {"select": "mahalanobis"}, epochs=6)
    for index in range(2):
        bench.learn(index)
    right = [bench.logits(index, None).argmax(dim=1) == bench.batch(index).labels for index in range(2)]
    assert float(torch.cat(right).float().mean()) > 0.5, "chance is a quarter"


def test_rules_on_logits_see_those_with_the_laterals(folders: dict[str, Path]) -> None:
    bench = Bench("vit", folders["vit"], "pnn", {"select": "energy"})
    for index in range(2):
        bench.learn(index, validation=bench.data(index))
    rows = bench.logits(1, 1)
    with torch.no_grad():
        bare = bench.method.heads.row_logits(bench.backbone.features(bench.batch(1).inputs), 1)
    found = bench.method.recogniser.state(1)
    energies = [t * (x / t).logsumexp(dim=1).mean().item() for t in [found["temperature"]] for x in (rows, bare)]
    assert energies[0] == pytest.approx(found["mean_energy"], rel=1e-5)
    assert abs(energies[1] - energies[0]) > 1e-4
    assert bench.logits(1, None).shape == (16, 4)


def test_random_columns_differ_by_task_and_come_back_by_key(folders: dict[str, Path]) -> None:
    benches = [Bench("vit", folders["vit"], "pnn", {"column_init": "random"}) for _ in range(2)]
    columns = []
    for bench in benches:
        for index in range(2):
            torch.manual_seed(len(columns))  # what ran before does not matter
            bench.method._add(index)
        columns.append([bench.method.task_modules.version(index) for index in range(2)])
    pretrained = benches[0].method.task_modules
    for path in columns[0][0]:
        states = [columns[run][index][path].state_dict() for run, index in ((0, 0), (1, 0), (0, 1))]
        for name, tensor in pretrained.original(path).state_dict().items():
            assert torch.equal(states[0][name], states[1][name])
            assert tensor.ndim < 2 or not torch.equal(states[0][name], tensor), name
            assert tensor.ndim < 2 or not torch.equal(states[0][name], states[2][name]), name


def test_what_makes_no_sense_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="name the modules"):
        Bench("bert", tiny_model("albert", tmp_path / "albert"), "pnn", {})
    with pytest.raises(OptionError, match="did you mean 'layer3'"):
        Bench("resnet", folders["resnet"], "pnn", {"sites": ("layer4",)})
    bench = Bench("resnet", folders["resnet"], "pnn", {"sites": ("layer3",)}, epochs=1)
    bench.learn(0)
    assert len(bench.method.head_rows().classes) == 2
    bench.learn(1)
    assert set(bench.method._laterals[1]) == {"layer3", "head"}
    with pytest.raises(UnsupportedError, match="no plain model can hold"):
        bench.method.head_rows()
