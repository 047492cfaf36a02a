"""Teaching one task to a method: the options and the loop."""

from everlora.training.checkpoint import Checkpoint, Checkpoints, Interval
from everlora.training.data import TaskData
from everlora.training.interruption import answering, is_asked, signals_ask, stop_if_asked
from everlora.training.loop import Progress, TaskTrainer, TrainingReport
from everlora.training.options import TrainingOptions
from everlora.training.processes import Processes, device_of_process, processes
from everlora.training.watching import Watcher

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Interval",
    "Processes",
    "Progress",
    "TaskData",
    "TaskTrainer",
    "TrainingOptions",
    "TrainingReport",
    "Watcher",
    "answering",
    "device_of_process",
    "is_asked",
    "processes",
    "signals_ask",
    "stop_if_asked",
]
