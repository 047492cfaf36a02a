"""A learner of language from creation to export: rows in, written answers out, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from everlora import Learner
from everlora.errors import DataError, ModelError, OptionError, UnsupportedError
from everlora.methods.i_lora import ILoraOptions
from everlora.methods.registry import parse_options
from everlora.results import LanguageEvaluation, LanguageScore

FAST: dict[str, Any] = {
    "scenario": "language",
    "rank": 4,
    "alpha": 8.0,
    "batch_size": 4,
    "lr": 1e-2,
    "lr_schedule": "constant",
    "epochs": 2,
    "max_length": 48,
    "max_new_tokens": 12,
}
SUMS = [{"instruction": f"{i} and {j}", "input": "", "output": f"{i + j} dogs"} for i in range(3) for j in range(3)]
LAMB = [{"text": "Mary had a little lamb. Its fleece was white as snow. " * 3}]


@pytest.fixture
def model(shared: Path) -> Path:
    return shared / "models" / "stories260K"


@pytest.mark.parametrize(
    "method",
    [
        "i_lora",
        "sd_lora",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("sequential", "replay", "ewc", "lwf", "o_lora", "inflora")
        ),
    ],
)
def test_a_learner_opened_between_tasks_goes_on_as_one_that_was_not(method: str, model: Path, tmp_path: Path) -> None:
    options = {k: v for k, v in FAST.items() if not (k == "alpha" and method in ("inflora", "sd_lora"))}
    learners = {name: Learner.create(tmp_path / name, model=model, method=method, **options) for name in ("a", "b")}
    for index, rows in enumerate((SUMS, LAMB)):
        learners["a"].learn(rows, name=f"task {index}")
        learners["b"].learn(rows, name=f"task {index}")
        learners["b"] = Learner.open(tmp_path / "b")
    assert learners["a"].digest == learners["b"].digest
    prompts = ["1 and 2", {"instruction": "2 and 2", "input": ""}]
    assert learners["a"].generate(prompts) == learners["b"].generate(prompts)


class _Breaks:
    """A watcher that fails after some steps."""

    def __init__(self, after: int = 1) -> None:
        self.left = after

    def step(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("the watcher failed")

    def task(self, *_: Any) -> None:
        raise AssertionError("no task was learned")


def test_after_a_failed_task_everything_is_answered_from_disk(model: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "l", model=model, method="sequential", **{**FAST, "lr": 0.1})
    learner.learn(SUMS)
    texts, rows = learner.generate(["1 and 2"]), learner._rules.load(SUMS, None)
    entropy = learner.evaluate_tasks([(0, rows)])[0].cross_entropy
    for ask in (
        lambda: learner.generate(["1 and 2"]) == texts,
        lambda: learner.evaluate_tasks([(0, rows)])[0].cross_entropy == entropy,
        lambda: all(weight.isfinite().all() for weight in learner.model.parameters()) and not learner._stale,
    ):
        with pytest.raises(RuntimeError, match="watcher failed"):
            learner.learn(LAMB, watch=_Breaks())
        assert learner._stale and ask()
    learner.learn(LAMB, discard_unfinished=True)


def test_what_is_measured_and_recorded(model: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "l", model=model, method="sequential", keep_validation=2, **FAST)
    result = learner.learn(SUMS, name="sums")
    assert (result.labels, result.num_examples, result.num_validation) == ((), 7, 2)
    found = learner.evaluate()
    assert isinstance(found, LanguageEvaluation)
    assert found.per_task["sums"].cross_entropy == pytest.approx(result.metrics["sums"])
    again = learner.evaluate(SUMS)
    assert isinstance(again, LanguageEvaluation)
    assert again.total.rows == 9 and again.total.answers == 9 and again.accuracy is not None
    [score] = learner.evaluate_tasks([(0, learner._rules.load(SUMS, None))])
    assert isinstance(score, LanguageScore) and score.cross_entropy == pytest.approx(again.cross_entropy, rel=1e-5)


def test_labels_are_chosen_by_likelihood(model: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "l", model=model, method="sequential", **{**FAST, "epochs": 8})
    rows = [{"text": f"the {animal} is {size}", "label": size} for animal in "abcdef" for size in ("big", "small")]
    learner.learn(rows, name="sizes", columns={"instruction": "text", "label": "label"})
    asked = [{"instruction": "the dog is big", "label_set": ["big", "small"]}]
    [answer] = learner.predict(asked)
    assert set(answer.scores) == {"big", "small"} and answer.label in answer.scores
    assert sum(answer.scores.values()) == pytest.approx(1, abs=1e-5)
    [written] = learner.predict("the dog is")
    assert written.text is not None and written.scores == {}


def test_a_plain_text_needs_no_columns(model: Path, tmp_path: Path) -> None:
    columns = {"instruction": "q", "output": "topic"}
    learner = Learner.create(tmp_path / "l", model=model, method="sequential", columns=columns, **FAST)
    learner.learn([{"q": row["instruction"], "topic": row["output"]} for row in SUMS])
    [one], several = learner.predict("1 and 1"), learner.predict(["1 and 1", "2 and 0"])
    assert one.text == several[0].text is not None and len(several) == 2
    assert learner.predict([{"q": "1 and 1"}])[0].text == one.text


def test_a_task_that_kept_no_rows_is_left_out(model: Path, tmp_path: Path) -> None:
    learner = Learner.create(tmp_path / "l", model=model, method="sequential", keep_validation=1, **FAST)
    learner.learn(SUMS, name="sums")
    before = learner.evaluate()
    learner.learn([{"text": "Mary had a little lamb."}], name="lamb")
    after = Learner.open(tmp_path / "l").evaluate()
    assert list(before.per_task) == list(after.per_task) == ["sums"]


def test_switched_off_i_lora_is_sequential_also_when_it_is_opened_again(model: Path, tmp_path: Path) -> None:
    own = {"use_ilora": False, "reset_optimizer": False}
    made = {
        name: Learner.create(tmp_path / name, model=model, method=method, **FAST, **options)
        for name, method, options in (("a", "i_lora", own), ("b", "i_lora", own), ("c", "sequential", {}))
    }
    for rows in (SUMS, LAMB):
        for name in made:
            made[name].learn(rows)
        made["b"] = Learner.open(tmp_path / "b")
    assert made["a"].digest == made["b"].digest
    factors = [[layer.up for layer in one.method.layers().values()] for one in made.values()]
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(*factors, strict=True))


@pytest.mark.parametrize("insert", ["online", "every_step"])
def test_no_row_is_written_where_the_memory_shall_not_be_saved(model: Path, tmp_path: Path, insert: str) -> None:
    options = {**FAST, "save_buffer": False, "buffer_insert": insert, "checkpoint_every": 2}
    learner = Learner.create(tmp_path / "l", model=model, method="i_lora", **options)
    with pytest.raises(RuntimeError, match="watcher failed"):
        learner.learn(SUMS, watch=_Breaks(after=4))
    arrays = list((tmp_path / "l").rglob("arrays.safetensors"))
    assert arrays and not any(key for path in arrays for key in load_file(path) if "buffer" in key)
    again = Learner.open(tmp_path / "l")
    with pytest.raises(UnsupportedError, match=r"went by the memory were not saved.*discard_unfinished"):
        again.learn(SUMS)
    again.learn(SUMS, discard_unfinished=True)
    assert len(again.tasks) == 1


def test_an_open_gate_can_be_stored(model: Path, tmp_path: Path) -> None:
    options = {**FAST, "selective_update": True, "min_update_threshold": -math.inf}
    Learner.create(tmp_path / "l", model=model, method="i_lora", **options)
    assert Learner.open(tmp_path / "l").settings.method_options.min_update_threshold == -math.inf


def test_one_name_or_names_with_commas_stand_for_several(model: Path, tmp_path: Path) -> None:
    for number, (given, meant) in enumerate(
        (("q_proj", ("q_proj",)), ("q_proj, v_proj", ("q_proj", "v_proj")), (("k_proj",), ("k_proj",)))
    ):
        learner = Learner.create(tmp_path / str(number), model=model, method="i_lora", targets=given, **FAST)
        assert {name.rpartition(".")[2] for name in learner.method.layers()} == set(meant)
    for given, meant in (("-1,-2", (-1, -2)), (-1, (-1,)), ("all", "all")):
        options = parse_options(ILoraOptions, {"hidden_state_layers": given}, "i_lora")
        assert options.hidden_state_layers == meant


def test_refusals_say_what_to_do(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'ncm' is for models of images and encoders of texts"):
        Learner.create(tmp_path / "a", model=model, method="ncm", scenario="language")
    with pytest.raises(OptionError, match="instrction"):
        Learner.create(tmp_path / "a", model=model, method="replay", columns={"instrction": "x"}, scenario="language")
    with pytest.raises(OptionError, match="a language model takes no"):
        Learner.create(tmp_path / "a", model=model, method="replay", pooling="mean", **FAST)
    with pytest.raises(OptionError, match="language"):
        Learner.create(tmp_path / "a", model=model, method="ncm", template="plain")
    assert not (tmp_path / "a").exists()
    learner = Learner.create(tmp_path / "l", model=model, method="replay", **FAST)
    with pytest.raises(DataError):
        learner.learn([{"instruction": "no answer"}])
    learner.learn(SUMS, name="sums")
    with pytest.raises(OptionError, match="leave task out"):
        learner.predict("1 and 1", task="sums")
    with pytest.raises(OptionError, match=r"whole number between 1 and .*found 0"):
        learner.generate(["1 and 1"], max_new_tokens=0)
    with pytest.raises(OptionError, match="no variant 'stable'"):
        learner.predict("1 and 1", variant="stable")
    with pytest.raises(DataError, match="keeps no validation rows"):
        learner.evaluate()


def test_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    Learner.create(tmp_path / "l", model=tmp_path / "model", method="sequential", **FAST)
    file = tmp_path / "model" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "chat_template": "{{ messages[0]['content'] }}!"}))
    with pytest.raises(ModelError, match="tokenizer or the template"):
        Learner.open(tmp_path / "l")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft of transformers
def test_from_a_file_of_rows_to_an_adapter_that_writes_the_same(shared: Path, tmp_path: Path) -> None:
    """The commands of a person, each in a process of its own, on 200 rows."""
    import os
    import subprocess
    import sys

    rows = [
        {"prompt": f"Question {i}: what follows {i}?", "answer": f"The number {i + 1} follows."} for i in range(200)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = shared / "models" / "stories260K"

    def run(*words: object) -> Any:
        command = [sys.executable, "-m", "everlora", *map(str, words), "--json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    run(
        *("init", "skill", "--model", model, "--scenario", "language", "--method", "i_lora", "--seed", 1),
        *("--set", "epochs=2", "--set", "lr=3e-3", "--set", "max_new_tokens=24"),
    )
    assert run("learn", "skill", "rows.jsonl")["num_examples"] == 200
    prompts = ["Question 7: what follows 7?", "Question 31: what follows 31?"]
    answers = [row["text"] for row in run("predict", "skill", *prompts)]
    assert all(answers)
    run("export", "skill", "out", "--format", "peft")

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    served = PeftModel.from_pretrained(plain, str(tmp_path / "out" / "stable")).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(f"{prompt}\n", add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            written = served.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=24,
                do_sample=False,
            )[0, len(ids) :]
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer.strip()
