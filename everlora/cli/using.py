"""`everlora predict` and `everlora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlora.cli import output
from everlora.cli.parameters import (
    AsJson,
    BaseModel,
    ColumnNames,
    Debug,
    Folder,
    ImageColumn,
    LabelColumn,
    TextColumn,
    columns_from,
)
from everlora.cli.progress import StageProgress
from everlora.results import LanguageEvaluation

if TYPE_CHECKING:
    from everlora.results import Evaluation, Prediction

__all__ = ["evaluate", "predict"]

Ranked = list[tuple[str, float]] | str
"""Labels with their scores, best first, or a text."""


def predict(
    folder: Folder,
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT or IMAGE FILE]...", help="What to label.", show_default=False)
    ] = None,
    *,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="CSV, TSV, JSON Lines or Parquet file, or folder of images."),
    ] = None,
    output_file: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Where to write the rows with their labels and scores added."),
    ] = None,
    text_column: TextColumn = None,
    image_column: ImageColumn = None,
    column: ColumnNames = None,
    variant: Annotated[
        str | None, typer.Option("--variant", help="Which weights answer, where a method keeps several.")
    ] = None,
    model: BaseModel = None,
    task: Annotated[str | None, typer.Option("--task", help="Name of the task the inputs belong to, if known.")] = None,
    top: Annotated[int, typer.Option("--top", metavar="K", min=1, help="How many labels to give for each input.")] = 1,
    none_of_these: Annotated[
        float | None,
        typer.Option(
            "--none-of-these",
            metavar="SHARE",
            help="Let the answer be none of the labels: below the confidence that this share of the learner's own "
            "validation rows stays below, such as 0.05.",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Label texts or image files, or let a language model answer, given as words or in a file."""
    if bool(inputs) == (input_file is not None):
        raise typer.BadParameter("give either texts or image files, or --input FILE", param_hint="predict")
    if output_file is not None and input_file is None:
        raise typer.BadParameter("--output goes with --input FILE", param_hint="--output")
    from everlora.cli import tables

    if output_file is not None:
        tables.check_output(output_file)
    table = tables.read_table(input_file) if input_file is not None else None
    with StageProgress():
        from everlora.learner import Learner

        learner = Learner.open(folder, model=model)
        named = columns_from(column, text=text_column, image=image_column)
        given: Any = inputs if input_file is None else tables.read_inputs(input_file, learner, named)
        answers = learner.predict(given, task=task, variant=variant, none_of_these=none_of_these)
    best = [_best(answer, top) for answer in answers]
    if table is not None and output_file is not None:
        if not output.is_first():
            return
        chosen = None if none_of_these is None else [answer.label for answer in answers]
        added = tables.write_table(output_file, table, best, chosen)
        _report_file(output_file, len(best), added, as_json=as_json)
        return
    titles = inputs if table is None else tables.titles(table, given)
    if as_json:
        rows = zip(titles or (), answers, best, strict=True)
        output.emit_json([_as_mapping(title, answer.label, ranked) for title, answer, ranked in rows])
    else:
        _print_answers(titles or [], best, [answer.label is None for answer in answers])


def _best(answer: Prediction, top: int) -> Ranked:
    return list(answer.scores.items())[:top] if answer.text is None else answer.text


def _as_mapping(text: str, label: str | None, ranked: Ranked) -> dict[str, Any]:
    if isinstance(ranked, str):
        return {"input": text, "text": ranked}
    return {
        "input": text,
        "label": label,
        "score": ranked[0][1],
        "top": [{"label": label, "score": score} for label, score in ranked],
    }


def _report_file(path: Path, num_rows: int, names: list[str], *, as_json: bool) -> None:
    if as_json:
        output.emit_json({"output": str(path), "num_rows": num_rows, "columns": names})
    else:
        output.line(f"Wrote {num_rows} rows to {path}, with the columns {' and '.join(names)} added.")


def _print_answers(texts: list[str], best: list[Ranked], refused: list[bool]) -> None:
    if any(isinstance(answer, str) for answer in best):
        output.table(("input", "answer"), [*zip(texts, map(_text_of, best), strict=True)])
        return
    rows = [
        (text if place == 0 else "", *cells)
        for text, ranked, none in zip(texts, best, refused, strict=True)
        if not isinstance(ranked, str)
        for place, cells in enumerate(_cells(ranked, none))
    ]
    output.table(("input", "label", "score"), rows)


def _text_of(answer: Ranked) -> str:
    """What was written, or the label that was chosen."""
    return answer if isinstance(answer, str) else answer[0][0]


def _cells(ranked: list[tuple[str, float]], is_refused: bool) -> list[tuple[str, str]]:
    """Labels with scores; those of a refused input stand below the refusal, and only where several were asked for."""
    labels = [(label, f"{score:.4f}") for label, score in ranked]
    return [("none of these", "-"), *(labels if len(labels) > 1 else [])] if is_refused else labels


def evaluate(
    folder: Folder,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="Labelled data; the rows kept back when not given.", show_default=False),
    ] = None,
    *,
    text_column: TextColumn = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    column: ColumnNames = None,
    model: BaseModel = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a learner on labelled data, or on the rows it kept back."""
    columns = columns_from(column, text=text_column, image=image_column, label=label_column)
    with StageProgress():
        from everlora.learner import Learner

        learner = Learner.open(folder, model=model)
        result = learner.evaluate(data, columns=columns)
    if as_json:
        output.emit_json(result)
        return
    _print_evaluation(result)


def _print_evaluation(result: Evaluation | LanguageEvaluation) -> None:
    if isinstance(result, LanguageEvaluation):
        _print_scores(result)
    else:
        _print_accuracies(result)


def _print_accuracies(result: Evaluation) -> None:
    sizes = {name: counts.size for name, counts in result.counts.items()}
    output.line(f"Accuracy {output.percent(result.accuracy)} % on {output.count(sum(sizes.values()), 'row')}.")
    rows = [(name, str(sizes[name]), output.percent(accuracy)) for name, accuracy in result.per_task.items()]
    output.table(("task", "rows", "accuracy %"), rows)


def _print_scores(result: LanguageEvaluation) -> None:
    scores = dict(result.per_task) | ({"all": result.total} if len(result.per_task) > 1 else {})
    rows = [
        (
            name,
            str(score.rows),
            str(score.tokens),
            f"{score.cross_entropy:.4f}",
            f"{score.perplexity:.2f}",
            f"{score.bits_per_byte:.4f}",
            output.percent(score.accuracy),
            output.percent(score.rouge_l),
        )
        for name, score in scores.items()
    ]
    output.table(("task", "rows", "tokens", "nats a token", "perplexity", "bits a byte", "right %", "ROUGE-L"), rows)
