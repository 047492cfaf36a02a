"""Bad input through the program: one sentence that names it, exit code 2, and nothing on disk has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from everlora import Learner
from everlora.cli import main
from tests.store.builders import snapshot
from tests.toy import FAST, toy_images, toy_texts


@pytest.fixture(scope="module")
def texts(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner of one task of texts."""
    folder = tmp_path_factory.mktemp("texts") / "learner"
    Learner.create(folder, model=tiny_bert, method="inflora", rank=2, **FAST).learn(
        toy_texts(["a", "b"], 4), name="one"
    )
    return folder


@pytest.fixture(scope="module")
def images(tiny_vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learner of one task of images."""
    folder = tmp_path_factory.mktemp("images") / "learner"
    Learner.create(folder, model=tiny_vit, method="inflora", rank=2, **FAST).learn(
        toy_images(["a", "b"], 4), name="one"
    )
    return folder


def refused(words: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the program; return its complaint, which must be one line, with exit code 2."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert printed.out == ""
    [line] = [line for line in printed.err.splitlines() if not line.startswith(("training", "collect", "reading"))]
    assert line.startswith("error: ") and "Traceback" not in line and "Error:" not in line
    return line


def _csv(content: str | bytes, name: str = "rows.csv") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def _folder(*files: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for file in files:
            file(folder)
        return folder

    return make


# what is wrong, the data, words of the complaint
TEXTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "an empty file": (_csv(""), ("rows.csv", "is empty")),
    "no rows": (_csv("text,label\n"), ("rows.csv", "holds no rows")),
    "no rows of JSON": (_csv("\n\n", "rows.jsonl"), ("rows.jsonl", "holds no rows")),
    "one class": (_csv("text,label\na b,x\nc d,x\n"), ("loss=seen",)),
    "no label column": (_csv("text,number\na b,0.5\nc d,1.5\n"), ("rows.csv", "no label column")),
    "a missing label": (_csv("text,label\na b,x\nc d,\n"), ("rows.csv", "row 2", "no label")),
    "a label that is no name": (_csv("text,label\na b,0.5\nc d,1.5\n"), ("row 1", "0.5")),
    "labels of two types": (
        _csv('{"text": "a", "label": "x"}\n{"text": "b", "label": 3}\n', "rows.jsonl"),
        ("row 2 has a number as label while earlier rows have a name",),
    ),
    "labels of another kind than before": (
        _csv('{"text": "a b", "label": 1}\n{"text": "c d", "label": 2}\n', "rows.jsonl"),
        ("'integer'", "'name'"),
    ),
    "a NaN as label": (
        _csv('{"text": "a", "label": NaN}\n{"text": "b", "label": 1}\n', "rows.jsonl"),
        ("row 1", "nan"),
    ),
    "a missing text": (_csv('{"text": "a", "label": "x"}\n{"label": "y"}\n', "rows.jsonl"), ("row 2", "no text")),
    "no UTF-8": (_csv(b"text,label\n\xff\xfe,x\n"), ("rows.csv", "save it as UTF-8")),
    "no UTF-8 far from the start": (
        _csv(b"text,label\n" + b"a b,x\n" * 9000 + b"\xe9,y\n"),
        ("rows.csv", "save it as UTF-8"),
    ),
    "semicolons": (_csv("text;label\na b;x\nc d;y\n"), ("rows.csv", "separator seems to be ';'", "commas")),
    "a file of no split": (
        _folder(_csv("text,label\na b,x\n", "train-a.csv"), _csv("text,label\nc d,y\n")),
        ("train-a.csv", "files of none (rows.csv)", "begin each name"),
    ),
    "cut in a quotation": (_csv('text,label\n"a b,x\nc'), ("rows.csv",)),
    "no JSON": (_csv('{"text": "a"', "rows.jsonl"), ("rows.jsonl", "line 1", "not JSON")),
    "JSON without end": (_csv('{"a":' * 5000, "rows.jsonl"), ("rows.jsonl", "line 1", "not JSON")),
    "another type of file": (_csv("x", "rows.docx"), ("rows.docx", "not a data file")),
    "no file": (lambda folder: folder / "nothing.csv", ("nothing.csv",)),
    "a broken table": (_csv(b"PAR1 and no more", "rows.parquet"), ("rows.parquet", "Parquet")),
}


@pytest.mark.parametrize("what", list(TEXTS))
def test_rows_of_text(what: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = TEXTS[what]
    before = snapshot(texts)
    line = refused(["learn", texts, make(tmp_path)], capsys)
    assert all(word in line for word in words), line
    assert snapshot(texts) == before


def test_a_named_column_that_is_missing(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(texts)
    data = _csv("text,label\na b,x\nc d,y\n")(tmp_path)
    line = refused(["learn", texts, data, "--label-column", "lable"], capsys)
    assert "no column 'lable'" in line and "did you mean 'label'?" in line
    assert snapshot(texts) == before


def test_unknown_labels_at_evaluation(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _csv("text,label\na b,a\nc d,never\n")(tmp_path)
    assert "label 'never'" in refused(["eval", texts, data], capsys)


def test_images_that_cannot_be_decoded_are_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(images)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "data" / name / "good.png")
    bad = tmp_path / "data" / "dog" / "broken.png"
    for content in (b"", b"not an image", (tmp_path / "data" / "cat" / "good.png").read_bytes()[:40]):
        bad.write_bytes(content)
        line = refused(["learn", images, tmp_path / "data"], capsys)
        assert str(bad) in line
    bad.unlink()
    table = _csv("image,label\ncat/good.png,cat\ncat/none.png,dog\n", "data/rows.csv")(tmp_path)
    assert "none.png" in refused(["learn", images, table, "--image-column", "image"], capsys)
    assert snapshot(images) == before


def test_features_that_are_not_finite(tiny_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(tiny_vit, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, model / "model.safetensors")
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            image = np.random.RandomState(number).randint(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / name / f"{number}.png")
    for method in ("inflora", "ncm", "sequential"):
        folder = tmp_path / method
        Learner.create(folder, model=model, method=method, **FAST)
        before = snapshot(folder)
        line = refused(["learn", folder, tmp_path / "data"], capsys)
        assert "finite" in line or "nan" in line.lower(), line
        assert {k: v for k, v in snapshot(folder).items() if not k.startswith("checkpoint")} == before


def test_texts_longer_than_the_model_takes_are_cut_and_counted(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(texts, tmp_path / "learner"))
    data = _csv("text,label\n" + "red " * 60 + ",x\n" + "blue card,y\n" + "green " * 30 + ",x\nlost,y\n")(tmp_path)
    assert main(["learn", str(folder), str(data)]) == 0
    assert "2" in capsys.readouterr().out
    assert Learner.open(folder).card()["tasks"][1]["num_truncated"] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "rank=17"], ("rank", "16")),
        (["--set", "rank=0"], ("rank",)),
        (["--set", "rnak=2"], ("did you mean 'rank'?",)),
        (["--set", 'targets=["atention.query"]'], ("matches no layer", "self.query")),
        (["--method", "infloar"], ("did you mean 'inflora'",)),
        (["--scenario", "class"], ("class_incremental",)),
        (["--model", "./nowhere"], ("nowhere",)),
    ],
)
def test_options_that_cannot_be(
    options: list[str], words: tuple[str, ...], tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options if "--model" in options else ["--model", str(tiny_bert), *options]
    line = refused(["init", tmp_path / "learner", *given], capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "learner").exists()
