"""What the pages promise before they are built: four parts a method, tables that agree with the source, navigation."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from everlora.methods import list_methods, method_spec
from scripts.docs_site import options_table, pages_of, public_names, rendered

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
NAMES = [entry.name for entry in list_methods()]
REFERENCE = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))


def _nav() -> list:
    # the extensions of mkdocs.yml are plain YAML here, so no loader of its own is needed
    return yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_formula_options_numbers_and_differences(name: str) -> None:
    page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    assert headings[0].split(",")[0] == name
    assert re.search(r"^\*Level: (reproduced|implemented|experimental)", page, flags=re.MULTILINE)
    assert "$$" in page, "the formula"
    order = [next((i for i, h in enumerate(headings) if h.startswith(part)), None) for part in ("Options", "Numbers")]
    assert None not in order, headings
    assert f"<!-- options of {name} -->" in page
    assert any(heading.startswith("Where we differ") for heading in headings)


def _told(page: str) -> list[tuple[str, str]]:
    """Names of options and their defaults from the tables that people wrote."""
    found, inside = [], False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| option | default |"):
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            found.append((cells[0], cells[1]))
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if method_spec(name).preset == {}])
def test_written_tables_of_options_agree_with_the_options(name: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(method_spec(name).method_class.options_type)}
    for cell, default in _told((DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")):
        names = re.findall(r"`(\w+)`", cell)
        assert names and set(names) <= set(fields), f"{name}: {cell}"
        for option, told in zip(names, default.split(", "), strict=False):
            value = fields[option].default
            plain = value if isinstance(value, str) else json.dumps(value)
            literal = re.fullmatch(r"`([^`]+)`|(-?[\d.,]+)", told)
            if literal is not None:
                said = literal.group(1) or literal.group(2)
                same = said == plain or (isinstance(value, int | float) and float(said.replace(",", "")) == value)
                assert same, f"{name}: the page says {option} is {said}, the class {plain}"


def test_the_search_for_stale_tables_finds_them() -> None:
    page = "| option | default | |\n|---|---|---|\n| `rank`, `alpha` | 8, 32 | of each |\n\n| `x` | 1 |\n"
    assert _told(page) == [("`rank`, `alpha`", "8, 32")]


def test_tables_of_options_come_from_the_source() -> None:
    table = options_table("inflora")
    assert "| `rank` | int >= 1 | `10` |" in table
    assert "| `forward_mode` |" in table and "`folded`" in options_table("inflora_opt")
    for name in (*NAMES, "training", "model", "learner"):
        assert options_table(name).count("\n") >= 2


def test_marks_and_formulas_are_filled_in_outside_of_code_only() -> None:
    page = "$$ a < b $$\n\n```text\n$$ a $$ <!-- methods -->\n```\n<!-- methods -->\n"
    shown = rendered(page)
    assert "<math" in shown and "```text\n$$ a $$ <!-- methods -->\n```" in shown
    assert "[`inflora`](inflora.md)" in shown


def test_the_navigation_leaves_out_what_is_not_there_and_takes_in_new_pages(tmp_path: Path) -> None:
    for name in ("index.md", "how/a.md", "how/b.md", "how/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# x\n")
    nav = ["index.md", {"How": ["how/b.md", "how/later.md", {"More": "how/*"}]}, {"None": ["other/*"]}]
    assert pages_of(nav, tmp_path) == ["index.md", {"How": ["how/b.md", {"More": ["how/a.md", "how/c.md"]}]}]


def test_every_page_is_in_the_navigation() -> None:
    def pages(nav: list) -> set[str]:
        values = [next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in nav]
        return set().union(*({value} if isinstance(value, str) else pages(value) for value in values))

    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert there == pages(pages_of(_nav(), DOCS))


@pytest.mark.parametrize("module", ["lowrank", "metrics", "callbacks", "streams", "errors", "store", "results"])
def test_public_names_are_in_the_reference(module: str) -> None:
    assert f"<!-- names of everlora.{module} -->" in REFERENCE
    assert public_names(f"everlora.{module}")


def test_links_between_files_lead_somewhere() -> None:
    broken = []
    for page in [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith(("http", "mailto:")) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(REPOSITORY)}: {target}")
    assert not broken


def test_citation_says_what_citing_needs() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert {"message", "title", "authors", "license", "version"} <= set(citation)
    assert f'\nversion = "{citation["version"]}"\n' in project and citation["license"] == "Apache-2.0"
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "identifiers"} <= set(reference)
        assert all(
            "name" in author or {"family-names", "given-names"} <= set(author) for author in reference["authors"]
        )


def test_policies_are_there() -> None:
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "## Reporting" in (REPOSITORY / "SECURITY.md").read_text(encoding="utf-8")
    assert "## Unreleased" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
