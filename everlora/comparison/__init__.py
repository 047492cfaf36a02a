"""Rows of several runs side by side: means over seeds, paired tests, other projects' numbers, published figures."""

from everlora.comparison.comparison import FORMATS, Comparison, compare, format_of

__all__ = ["FORMATS", "Comparison", "compare", "format_of"]
