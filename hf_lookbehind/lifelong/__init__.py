"""Lifelong learning: one model trained on tasks that come one after another, and how much of them it forgets."""

from .memory import ReplayMemory
from .metrics import average_accuracy, backward_transfer, forgetting, forward_transfer, learning_accuracy
from .replay_methods import AGEM, ExperienceReplay, JointTraining, NoReplay, make_replay
from .runner import SequenceResult, train_sequence
from .tasks import LifelongTask, TaskSequence

__all__ = [
    "AGEM",
    "ExperienceReplay",
    "JointTraining",
    "LifelongTask",
    "NoReplay",
    "ReplayMemory",
    "SequenceResult",
    "TaskSequence",
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "make_replay",
    "train_sequence",
]
