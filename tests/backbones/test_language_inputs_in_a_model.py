"""Batches in a real language model: padding and packing leave the losses alone, and the base has its known figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from everlora.backbones.language_inputs import LanguageInputs
from everlora.streams import Examples, load_dialogues
from tests.backbones.language_builders import task, text

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
ROWS = [
    task("Who is Lily?", "A little girl who likes to play in the park."),
    task("What did Tim see?", "A dog."),
    task("Tell a story.", "Once upon a time there was a big red ball.", input="a ball"),
    task("Yes or no?", "no"),
]


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def inputs_of(folder: Path, max_length: int = 512, **options: Any) -> LanguageInputs:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return LanguageInputs(tokenizer, max_length, vocab_size=512, **options)


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        result: Tensor = model(**{name: batch[name] for name in names if name in batch}).logits
    return result


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses[labels[:, 1:].flatten() != -100]


def test_real_tokenizer(folder: Path) -> None:
    inputs = inputs_of(folder)
    assert (inputs.bos, inputs.eos, inputs.pad, inputs.template_text) == (1, 2, 0, "{instruction}\n{input}\n")
    encoded = inputs.encode(ROWS)
    for place, row in enumerate(ROWS):
        tokens, start = encoded.row(place).tolist(), int(encoded.prompt_lengths[place])
        answer = json.loads(row)["output"]
        assert tokens[0] == 1 and tokens[-1] == 2 and tokens.count(1) == 1
        assert inputs.decode(tokens[start:]) == answer and encoded.num_bytes[place] == len(answer.encode())
        assert tokens[:start] == inputs.encode_prompts([row])[0]


def test_padding_on_the_right_changes_nothing(folder: Path, model: Any) -> None:
    inputs = inputs_of(folder)
    encoded = inputs.encode(ROWS)
    batch = inputs.collate(encoded, range(4), device=CPU)
    together = logits_of(model, batch)
    wider = {
        name: functional.pad(tensor, (0, 9), value={"labels": -100, "input_ids": 2}.get(name, 0))
        for name, tensor in batch.items()
    }
    torch.testing.assert_close(
        token_losses(logits_of(model, wider), wider["labels"]),
        token_losses(together, batch["labels"]),
        rtol=1e-6,
        atol=1e-5,
    )
    for row in range(4):
        alone = logits_of(model, inputs.collate(encoded, [row], device=CPU))[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-6, atol=5e-5)


def test_padding_on_the_left_changes_nothing_given_positions(folder: Path, model: Any) -> None:
    inputs = inputs_of(folder)
    prompts = inputs.encode_prompts(ROWS)
    batch = inputs.collate_prompts(prompts, device=CPU)
    together = logits_of(model, batch)
    for row, prompt in enumerate(prompts):
        alone = logits_of(model, {"input_ids": torch.tensor([prompt])})[0]
        torch.testing.assert_close(together[row, -len(prompt) :], alone, rtol=1e-6, atol=2e-5)  # of logits up to 20


def test_a_row_in_a_packed_line_sees_itself_only(folder: Path, model: Any) -> None:
    inputs = inputs_of(folder, max_length=64)
    encoded = inputs.encode([*ROWS, text("Once upon a time there was a boy. He was sad.")])
    packed = inputs.collate(encoded, range(5), device=CPU, pack=True)
    assert len(packed["input_ids"]) < 5
    segments = packed["segments"]
    allowed = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    logits = logits_of(model, {**packed, "attention_mask": mask})
    expected = []
    for row in range(5):
        alone = inputs.collate(encoded, [row], device=CPU)
        expected.append(token_losses(logits_of(model, alone), alone["labels"]))
    torch.testing.assert_close(
        token_losses(logits, packed["labels"]).sort().values, torch.cat(expected).sort().values, rtol=0, atol=1e-4
    )
    # The rows lie in the lines in the order of first fit: compare the first line token by token.
    first = token_losses(logits[:1], packed["labels"][:1])
    torch.testing.assert_close(first[: len(expected[0])], expected[0], rtol=0, atol=1e-4)
    # The mask matters: without it the later rows of a line read the earlier ones.
    leaking = logits_of(model, {name: packed[name] for name in ("input_ids", "attention_mask", "position_ids")})
    assert (token_losses(leaking, packed["labels"]) - token_losses(logits, packed["labels"])).abs().max() > 0.01


def first_bytes(examples: Examples, count: int, *, as_one: bool) -> list[str]:
    """Return rows with the first `count` bytes of the texts, as one text or apart."""
    texts = [str(json.loads(row)["text"]) for row in examples.inputs]
    if as_one:
        return [text("\n".join(texts).encode()[:count].decode(errors="ignore"))]
    rows = []
    for content in texts:
        rows.append(text(content.encode()[:count].decode(errors="ignore")))
        count -= len(content.encode())
        if count <= 0:
            break
    return rows


@pytest.mark.parametrize(
    ("name", "columns", "as_one", "loss", "size"),
    [
        # As one stream: 4.92, 4.84 and 5.61 by an earlier measurement of unknown cutting, hence 0.06.
        ("tinyshakespeare", None, True, 4.96, 1.60),
        ("agnews", None, True, 4.87, 1.52),
        ("gsm8k", {"text": "{question}\n{answer}"}, True, 5.60, 1.51),
        # Apart, each within bos and eos, which this model hardly expects inside a block.
        ("agnews", None, False, 5.05, 1.51),
        ("gsm8k", {"text": "{question}\n{answer}"}, False, 5.65, 1.50),
    ],
)
def test_the_base_has_its_known_figures(
    folder: Path, model: Any, name: str, columns: dict[str, str] | None, as_one: bool, loss: float, size: float
) -> None:
    examples = load_dialogues(folder.parents[1] / "data" / name, split="test", columns=columns)
    inputs = inputs_of(folder, block_size=128)
    rows = first_bytes(examples, 60_000, as_one=as_one)
    encoded = inputs.encode(rows)
    assert (encoded.token_ids != 0).all()  # no unknown token
    total, count = 0.0, 0
    for start in range(0, len(encoded), 32):
        batch = inputs.collate(encoded, range(start, min(start + 32, len(encoded))), device=CPU)
        losses = token_losses(logits_of(model, batch), batch["labels"])
        total, count = total + float(losses.sum()), count + len(losses)
    known = {"tinyshakespeare": 4.92, "agnews": 4.84, "gsm8k": 5.61}
    assert total / count == pytest.approx(loss, abs=0.01)
    if as_one:
        assert total / count == pytest.approx(known[name], abs=0.06)
    bytes_per_token = int(encoded.num_bytes.sum()) / count
    assert bytes_per_token == pytest.approx(size, abs=0.01)
    assert total / math.log(2) / int(encoded.num_bytes.sum()) == pytest.approx(loss / math.log(2) / size, abs=0.05)
    scored = int(encoded.num_bytes.sum()) / sum(len(json.loads(row)["text"].encode()) for row in rows)
    assert 0.985 < scored < 1  # all bytes but those of the first token of each block
