from __future__ import annotations

import subprocess
import sys

import pytest

from everlora.errors import OptionError
from everlora.experiments import list_recipes, load_recipe, recipe_text
from everlora.experiments.plan import make_plan
from everlora.experiments.recipe import parse_recipe, stream_of
from everlora.streams.orders import class_order

NAMES = [info.name for info in list_recipes()]


def test_the_promised_recipes_exist_and_say_where_they_ran():
    status = {info.name: info.status for info in list_recipes()}
    here = {"digits", "digits-domains", "clinc150-minilm", "cifar100-vit-small", "convlora-vs-senacnn"}
    here |= {"stories-domains", "agnews-clinc-instructions"}
    papers = {
        "inflora-cifar100-vit-b16",
        "inflora-imagenet-r-vit-b16",
        "inflora-cifar100-dino-vit-b16",
        "inflora-imagenet-r-dino-vit-b16",
        "inflora-domainnet-vit-b16",
        "lgq-coding-cifar100-20-epochs",
        "lgq-coding-cifar100-2-epochs",
        "sd-lora-cifar100-vit-b16",
        "sd-lora-imagenet-r-vit-b16",
        "sd-lora-imagenet-a-vit-b16",
        "sd-lora-cub-vit-b16",
        "sd-lora-domainnet-vit-b16",
        "convlora-vs-senacnn-vgg19",
        "trace-llama2-7b-i-lora",
    }
    assert status == dict.fromkeys(here, "runs-here") | dict.fromkeys(papers, "not-run-here")


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_is_a_page(name):
    recipe, text = load_recipe(name), recipe_text(name)
    assert recipe.name == name
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ")
    for word in ("# Trains ", "# Source ", "# Expect ", "# Run ", "# Variant "):
        assert any(line.startswith(word) for line in header), word
    assert f"everlora run {name}" in text


@pytest.mark.parametrize("name", NAMES)
def test_every_row_and_setting_of_a_packaged_recipe_has_valid_options(name):
    recipe = load_recipe(name)
    for setting in recipe.settings:
        plan = make_plan(recipe_text(name), file=name, setting=setting, methods=list(recipe.methods), model="anything")
        assert plan.rows == tuple(recipe.methods)


def test_published_figures_are_those_of_the_papers():
    pages = {name: load_recipe(name).published for name in NAMES}
    paper = {
        (name, figure.setting): (figure.last, figure.avg)
        for name, figures in pages.items()
        for figure in figures
        if figure.source.endswith("paper") and name.startswith("inflora")
    }
    assert paper == {
        ("inflora-cifar100-vit-b16", "standard"): (86.51, 91.70),
        ("inflora-imagenet-r-vit-b16", "standard"): (75.65, 80.82),
        ("inflora-imagenet-r-vit-b16", "5-tasks"): (77.52, 82.01),
        ("inflora-imagenet-r-vit-b16", "20-tasks"): (71.01, 77.28),
    }
    assert [(one.last, one.avg) for one in pages["lgq-coding-cifar100-2-epochs"]] == [(79.47, 87.80)]
    assert all(not load_recipe(name).published for name in NAMES if load_recipe(name).status == "runs-here")


def test_published_figures_of_sd_lora_are_those_of_the_paper():
    pages = {name: load_recipe(name).published for name in NAMES if name.startswith("sd-lora")}
    paper = {
        (name.removeprefix("sd-lora-").removesuffix("-vit-b16"), figure.setting, figure.method): figure.last
        for name, figures in pages.items()
        for figure in figures
        if figure.source.startswith("SD-LoRA, ICLR 2025")
    }
    rows = {
        ("cifar100", "standard"): (88.01, 87.26, 87.09),
        ("imagenet-r", "5-tasks"): (79.15, 79.01, 78.85),
        ("imagenet-r", "standard"): (77.34, 77.18, 77.03),
        ("imagenet-r", "20-tasks"): (75.26, 74.05, 74.12),
        ("imagenet-a", "standard"): (55.96, 55.59, 54.24),
        ("domainnet", "standard"): (72.82, 72.58, 72.15),
    }
    family = ("sd_lora", "sd_lora_rr", "sd_lora_kd")
    expected = {(*place, method): last for place, row in rows.items() for method, last in zip(family, row, strict=True)}
    assert paper == expected | {("cub", "standard", "sd_lora"): 77.48}


def test_the_protocol_of_the_clinc150_recipe():
    recipe = load_recipe("clinc150_minilm")
    stream = stream_of(recipe, recipe.settings["standard"])
    assert (stream.initial, stream.increment, stream.order, recipe.seeds) == (15, 15, 1993, (1993,))
    assert recipe.training == {
        "epochs": 3,
        "batch_size": 32,
        "optimizer": "adam",
        "lr": 1e-3,
        "head_lr": 5e-3,
        "lr_schedule": "constant",
        "dropout": False,
    }
    assert recipe.backbone == {"pooling": "mean", "max_length": 32}
    assert recipe.methods["inflora"].set == {"rank": 10, "threshold_start": 0.95}


def test_a_setting_changes_the_stream():
    recipe = load_recipe("inflora-imagenet-r-vit-b16")
    sizes = {name: stream_of(recipe, setting).increment for name, setting in recipe.settings.items()}
    assert sizes == {"standard": 20, "5-tasks": 40, "20-tasks": 10}


def test_reading_recipes_imports_no_torch():
    code = (
        "import sys; from everlora.experiments import list_recipes, recipe_text, load_recipe; list_recipes();"
        "load_recipe('digits'); bad = {'torch', 'datasets', 'transformers', 'numpy'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_floats_without_a_dot_are_numbers(tiny):
    recipe = parse_recipe(tiny.replace("lr: 1e-2", "lr: 1e-2, head_lr: 5E+1, weight_decay: 0.5e-3"), file="tiny.yaml")
    assert (recipe.training["lr"], recipe.training["head_lr"], recipe.training["weight_decay"]) == (0.01, 50.0, 0.0005)


def test_a_recipe_can_be_a_file(recipe_file):
    assert load_recipe(recipe_file).name == load_recipe(str(recipe_file)).name == "tiny"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("title:", "titel:", "tiny.yaml: unknown field 'titel'; did you mean 'title'?"),
        ("  increment:", "  incremnt:", "unknown field 'stream.incremnt'; did you mean 'increment'?"),
        ("lr: 1e-2, augment: none}", "lr: [{a: 1}]}", "field 'training.lr"),
        ("{method: probe}", "{methd: probe}", "unknown field 'methods.probe.methd'; did you mean 'method'?"),
        ("subsample: {train: 3", "subsample: {trian: 3", "'settings.short.subsample.trian'; did you mean 'train'?"),
        ("  standard: {}", "  usual: {}", "field settings has no 'standard'"),
        ("last: 50.5,", "lsat: 50.5,", "unknown field 'published[0].lsat'"),
        ("last: 50.5,", "last: 150.5,", "field 'published[0].last' has the value 150.5; input should be less than"),
        ("{source: nobody,", "{source: nobody, setting: shrot,", "published[0].setting names 'shrot'"),
        ("probe, joint]", "porbe, joint]", "default_methods names 'porbe', which methods lacks; did you mean 'probe'?"),
        ("methods: [inflora]", "methods: [nothing]", "settings.short.methods names 'nothing'"),
        ("runs-here", "ran-here", "field 'status' has the value 'ran-here'"),
        ("seeds: [3, 4]", "seeds: []", "field 'seeds' has the value []"),
        ("seeds: [3, 4]", "seeds: [three]", "field 'seeds[0]' has the value 'three'"),
        (
            "  builtin: sklearn:digits",
            "  config: x",
            "'data' names no source; give one of hub, shared, builtin or sets",
        ),
        ("  increment: 2\n", "", "'stream' splits by class without increment"),
        (
            "  builtin: sklearn:digits",
            "  sets: [{name: one, builtin: sklearn:digits}]",
            "has data.sets, of which only stream.by: datasets makes tasks",
        ),
        (
            "  builtin: sklearn:digits",
            "  sets: [{name: one, builtin: sklearn:digits}]\n  drop_labels: [x]",
            "'data' has drop_labels beside sets, where nothing reads it",
        ),
        ("    training: {epochs: 2}", "    stream: {incremant: 1}", "'settings.short.stream.incremant'; did you mean"),
        ("title: Six colours in three tasks\n", "", "field 'title' is missing"),
        (
            "name: tiny",
            "name: tiny\nname: other",
            "tiny.yaml, line 2: not a valid YAML file: the key 'name' is given twice",
        ),
        ("name: tiny", "name: Tiny Recipe", "field 'name' has the value 'Tiny Recipe'"),
        ("name: tiny", "name: [", "tiny.yaml, line"),
        ("name: tiny", "name: tiny\n7: x", "found the key 7"),
    ],
)
def test_a_broken_recipe_is_refused_in_one_sentence(tiny, old, new, words):
    assert old in tiny
    with pytest.raises(OptionError) as caught:
        parse_recipe(tiny.replace(old, new, 1), file="tiny.yaml")
    message = str(caught.value)
    assert words in message
    assert message.startswith("tiny.yaml")
    assert "\n" not in message


@pytest.mark.parametrize(
    "text", ["", "just words", "- a\n- list\n", "name: !!python/object:os.system {}", "a: &x [*x]"]
)
def test_text_that_is_no_recipe(text):
    with pytest.raises(OptionError, match=r"^odd\.yaml"):
        parse_recipe(text, file="odd.yaml")


def test_damaged_recipes_load_or_are_refused_but_never_crash(tiny):
    lines = tiny.splitlines(keepends=True)
    texts = ["".join(lines[:index] + lines[index + 1 :]) for index in range(len(lines))]
    texts += [tiny[:end] for end in range(0, len(tiny), 37)]
    texts += [tiny.replace(":", "", 1 + count).replace("[", "{", count) for count in range(0, 30, 3)]
    refused = 0
    for text in texts:
        try:
            parse_recipe(text, file="damaged.yaml")
        except OptionError as error:
            refused += 1
            assert str(error).startswith("damaged.yaml")
            assert "\n" not in str(error)
    assert refused > len(texts) // 3


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'digits'"):
        load_recipe("digit")
    with pytest.raises(OptionError, match=r"nothing\.yaml: there is no such recipe file"):
        load_recipe(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="not a text file"):
        load_recipe(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_both_learning_rates(name: str) -> None:
    """A change of a default must not move a published protocol; a language model has no head of its own."""
    recipe = load_recipe(name)
    given = set(recipe.training)
    assert {"batch_size", "optimizer", "lr", "lr_schedule", "weight_decay"} <= given or recipe.table != "language"
    assert {"epochs", "max_steps"} & given
    assert {"epochs", "batch_size", "optimizer", "lr", "head_lr"} <= given or recipe.table == "language"


def test_the_protocol_of_the_comparison_of_cnns() -> None:
    recipe = load_recipe("convlora_vs_senacnn")
    assert recipe.default_methods == ("convlora", "senacnn", "pnn", "independent", "joint", "sequential")
    assert set(recipe.methods) == {
        *recipe.default_methods,
        *("probe", "ncm", "replay", "lwf", "ewc", "packnet", "convlora_r2", "convlora_r8"),
    }
    assert {row.family for row in recipe.methods.values()} == {
        "rehearsal",
        "distance-based",
        "sub-networks",
        "dynamic networks",
        "reference",
    }
    assert (recipe.seeds, recipe.default_setting, recipe.reference) == ((0, 1, 2), "mini", "independent")
    sizes = {}
    for name, setting in recipe.settings.items():
        stream, training = stream_of(recipe, setting), recipe.training | setting.training
        kept = int(training["keep_validation"])
        rows = None if setting.subsample.train is None else setting.subsample.train - kept
        sizes[name] = (stream.tasks, stream.increment, rows, kept, setting.subsample.test, training["epochs"])
    assert sizes == {
        "smoke": (3, 5, 20, 5, 10, 1),
        "mini": (4, 10, 32, 8, 20, 4),
        "small": (None, 10, 100, 20, 50, 5),
        "small-resnet32": (None, 10, 100, 20, 50, 5),
        "full": (None, 10, None, 50, None, 30),
    }
    assert (recipe.training["optimizer"], recipe.training["weight_decay"]) == ("adamw", 1e-4)
    assert recipe.training["keep_best"] and recipe.training["drop_last"]
    own = {key for row in recipe.methods.values() for key in row.set}
    assert own <= {"rank", "alpha", "train", "lr"}, "rows differ in their method and their rate alone"
    assert list(recipe.claims) == ["C1", "C1b", "C2", "C3", "C4", "C5-step", "C5-memory", "C5-disk", "C6"]


def test_published_figures_of_the_comparison_of_cnns() -> None:
    figures = load_recipe("convlora-vs-senacnn-vgg19").published
    assert [(one.method, one.learning, one.growth) for one in figures] == [
        ("convlora", 85.11, 1.70),
        ("senacnn", 86.04, 97.49),
        ("convlora", 75.41, 1.99),
        ("senacnn", 77.37, 97.50),
        ("independent", 77.45, None),
    ]


@pytest.mark.parametrize(
    ("seed", "first"), [(0, [26, 86, 2, 55, 75]), (1, [80, 84, 33, 81, 93]), (2, [83, 30, 56, 24, 16])]
)
def test_class_orders_are_the_usual_ones(seed: int, first: list[int]) -> None:
    assert class_order(100, seed)[:5].tolist() == first
