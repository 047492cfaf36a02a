"""From stored counts to a table and to one self-contained HTML page. Both take their numbers from `summarise`."""

from everlora.report.claims import claims_caption, format_claims
from everlora.report.layouts import CaptionedTable, tables
from everlora.report.learner_results import learner_results
from everlora.report.page import render_report, write_report
from everlora.report.table import FormattedTable, Row, Statistic, format_table, summarise

__all__ = [
    "CaptionedTable",
    "FormattedTable",
    "Row",
    "Statistic",
    "claims_caption",
    "format_claims",
    "format_table",
    "learner_results",
    "render_report",
    "summarise",
    "tables",
    "write_report",
]
