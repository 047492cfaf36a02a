"""Handing a learned model on: merged weights for plain tools, or an adapter for plain PEFT."""

from everlora.export.causal_lm import export_language
from everlora.export.head import ExportHead
from everlora.export.tasks import choose_task, network_of
from everlora.export.write import ExportReport, export_merged, export_peft

__all__ = ["ExportHead", "ExportReport", "choose_task", "export_language", "export_merged", "export_peft", "network_of"]
