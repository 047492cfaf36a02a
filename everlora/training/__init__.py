"""Teaching one task to a method: the options and the loop."""

from everlora.training.data import TaskData
from everlora.training.loop import Progress, TaskTrainer, TrainingReport
from everlora.training.options import TrainingOptions

__all__ = ["Progress", "TaskData", "TaskTrainer", "TrainingOptions", "TrainingReport"]
