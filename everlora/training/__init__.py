"""Teaching one task to a method: the options and the loop."""

from everlora.training.data import TaskData
from everlora.training.loop import Progress, TaskTrainer, TrainingReport
from everlora.training.options import TrainingOptions
from everlora.training.processes import Processes, device_of_process, processes

__all__ = [
    "Processes",
    "Progress",
    "TaskData",
    "TaskTrainer",
    "TrainingOptions",
    "TrainingReport",
    "device_of_process",
    "processes",
]
