"""Which tokens enter the second moments, and what is said of those that hold nearly everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from everlora import Learner
from everlora.errors import NumericError, OptionError
from everlora.methods.base import Batch
from everlora.methods.measured_tokens import measured_tokens
from tests.methods.test_inflora import RANK, WIDTH, ToyEncoder, _learn_task, _make
from tests.toy import tiny_model, toy_images, toy_learner

IDS = torch.tensor([[1, 5, 6, 7], [1, 5, 8, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
LABELS = torch.tensor([[-100, -100, 6, 7], [-100, 5, 8, -100]])


def test_all_tokens_but_some() -> None:
    batch = Batch({"input_ids": IDS}, LABELS)
    assert measured_tokens(batch, MASK, tokens="all", excluded=()) is MASK
    found = measured_tokens(batch, MASK, tokens="all", excluded=(1, 8))
    assert found is not None and found.int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    assert MASK.int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]], "the encoder's mask stays"


def test_tokens_that_predict_one_with_a_loss() -> None:
    found = measured_tokens(Batch({"input_ids": IDS}, LABELS), MASK, tokens="loss", excluded=())
    assert found is not None and found.int().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_images_and_rows_without_targets_have_no_such_choice(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="leave them out"):
        measured_tokens(Batch({"input_ids": IDS}, torch.tensor([0, 1])), MASK, tokens="loss", excluded=())
    learner = toy_learner(tmp_path / "l", tiny_model("vit", tmp_path / "vit"), "inflora", exclude_tokens=(3,))
    with pytest.raises(OptionError, match="exclude_tokens for models of texts"):
        learner.learn(toy_images(["a", "b"]))


def test_a_language_model_is_measured_without_its_first_token(shared: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"{i} and {j}", "output": f"{i + j} dogs"} for i in range(3) for j in range(3)]
    options = {"scenario": "language", "rank": 2, "batch_size": 9, "epochs": 1, "max_length": 32}
    ranks = {}
    for name, chosen in (("all", {}), ("some", {"exclude_tokens": (1,)}), ("loss", {"tokens": "loss"})):
        learner = Learner.create(
            tmp_path / name, model=shared / "models" / "stories260K", method="inflora", **options, **chosen
        )
        learner.learn(rows)
        ranks[name] = learner.method.panels()["occupied_rank"]
        assert Learner.open(tmp_path / name).method.panels()["occupied_rank"] == ranks[name]
    assert ranks["all"] != ranks["some"] and ranks["all"] != ranks["loss"], "other tokens, other directions"


class RareLayer(nn.Module):
    """A second pair of projections that only the first forward pass goes through, as an expert that is not chosen."""

    def __init__(self, usual: nn.Module) -> None:
        super().__init__()
        self.usual, self.rare = usual, nn.ModuleDict({"key": nn.Linear(WIDTH, WIDTH).double()})
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = self.usual(x)
        return found + 0 * self.rare["key"](x * 2) if self.calls == 1 else found


def test_a_layer_that_reads_nothing_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    encoder = ToyEncoder()
    encoder.model = RareLayer(encoder.model).requires_grad_(False)
    method, calls = _make(encoder), []
    for index in range(2):
        _learn_task(method, encoder, index, calls)
    assert "read 0 tokens for rank 2; it is left as it is" in caplog.text
    rare = method.layers()["rare.key"]
    assert rare.past_ranks.tolist() == [0, 0] and method.layers()["usual.key"].past_ranks.tolist() == [RANK, RANK]
    again = ToyEncoder()
    again.model = RareLayer(again.model).requires_grad_(False)
    restored = _make(again)
    restored.load_state(method.state())
    assert [m.updates > 0 for m in restored.memories.values()] == [m.updates > 0 for m in method.memories.values()]


def test_nothing_read_at_all_is_refused() -> None:
    encoder, calls = ToyEncoder(), []
    encoder.token_mask = lambda batch: torch.zeros_like(batch["mask"], dtype=torch.bool)  # type: ignore[method-assign]
    with pytest.raises(NumericError, match="read no token, and no other did"):
        _learn_task(_make(encoder), encoder, 0, calls)


@pytest.mark.parametrize("normalize", [False, True])
def test_one_token_that_holds_everything_is_said_and_mended(normalize: bool, caplog: pytest.LogCaptureFixture) -> None:
    encoder, calls = ToyEncoder(), []
    features = encoder.features

    def with_a_sink(batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"].clone()
        x[:, 0] = 0
        x[:, 0, 0] = 1000  # the same huge vector in the first place of every row
        return features({**batch, "x": x})

    encoder.features = with_a_sink  # type: ignore[method-assign]
    method = _make(encoder, normalize_tokens=normalize)
    for index in range(2):
        _learn_task(method, encoder, index, calls, steps=1)
    assert caplog.text.count("one direction holds more than 95 % of the energy") == (not normalize)
    [memory] = method.memories.values()
    assert (memory.occupied_rank > 2) == normalize
