"""From stored counts to a table and to one self-contained HTML page. Both take their numbers from `summarise`."""

from everlora.report.page import render_report, write_report
from everlora.report.table import FormattedTable, Row, Statistic, format_table, summarise

__all__ = ["FormattedTable", "Row", "Statistic", "format_table", "render_report", "summarise", "write_report"]
