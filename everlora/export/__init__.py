"""Handing a learned model on: merged weights for plain transformers, or an adapter for plain PEFT."""

from everlora.export.head import ExportHead
from everlora.export.write import ExportReport, export_merged, export_peft

__all__ = ["ExportHead", "ExportReport", "export_merged", "export_peft"]
