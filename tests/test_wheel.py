"""The wheel: what it holds, what it says of itself, and that the program runs from it without the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PARTS = ("everlora", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, built from a copy so that the checkout gets no build folders."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        part = REPOSITORY / name
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
        shutil.copytree(part, source / name, ignore=ignored) if part.is_dir() else shutil.copy(part, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("everlora-*.whl")
    return found


def _missing(names: set[str]) -> set[str]:
    """Files of the package that a distribution should hold and does not."""
    package = REPOSITORY / "everlora"
    kept = (".py", ".yaml", ".jinja", ".typed", ".safetensors", ".json", ".md")
    wanted = {
        p.relative_to(REPOSITORY).as_posix() for p in package.rglob("*") if p.suffix in kept or p.name == "py.typed"
    }
    return {name for name in wanted if "__pycache__" not in name and "_cache/" not in name} - names


def test_the_wheel_holds_weights_recipes_templates_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not _missing(names)
    for name in ("py.typed", "recipes/digits.yaml", "weights/vit-tiny-imagenet-32/model.safetensors"):
        assert f"everlora/{name}" in names
    assert any(name.startswith("everlora/report/") and name.endswith(".jinja") for name in names)
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name]


def test_the_sdist_can_be_built_from(built: Path) -> None:
    (sdist,) = built.glob("everlora-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not _missing(names) and "pyproject.toml" in names


def test_the_wheel_says_what_installers_ask(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Name"] == "everlora" and metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"dev", "docs", "quant", "timm", "trl"} <= set(metadata.get_all("Provides-Extra"))
    required = metadata.get_all("Requires-Dist")
    assert any(line.startswith("torch>=") for line in required)
    assert not [line for line in required if line.startswith(("timm", "trl", "mkdocs")) and "extra ==" not in line]
    assert "everlora = everlora.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    licences = [name for name in archive.namelist() if name.startswith(f"{info}/licenses/")]
    assert any(name.endswith("LICENSE") for name in licences) and any("WEIGHTS" in name for name in licences)


def test_the_program_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *install, "--target", str(target), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def printed(*command: str) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = printed(sys.executable, "-c", "import everlora; print(everlora.__file__)")
    assert Path(where.strip()).is_relative_to(target)
    program = str(target / "bin" / "everlora")
    assert "everlora 0." in printed(program, "--version")
    assert "digits" in printed(program, "recipes")
    printed(program, "run", "digits", "--methods", "ncm", "--workers", "1", "--out", "runs")
    assert (elsewhere / "runs" / "results.json").is_file()
    assert "<html" in (elsewhere / "runs" / "report.html").read_text(encoding="utf-8")
