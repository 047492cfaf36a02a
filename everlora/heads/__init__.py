"""Classification heads that grow with the tasks, and the ways to calibrate them."""

from everlora.heads.alignment import Aligner, AlignmentOptions, ClassStatistics, align_heads
from everlora.heads.task_heads import HeadRows, TaskHeads

__all__ = ["Aligner", "AlignmentOptions", "ClassStatistics", "HeadRows", "TaskHeads", "align_heads"]
