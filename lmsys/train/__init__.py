"""Training a TransformerLM: the loop, the step's engine, checkpoints, guards, logs."""

from lmsys.train.checkpoint import CHECKPOINTS
from lmsys.train.checks import check, check_setup, total_steps
from lmsys.train.log import init_wandb, logged
from lmsys.train.loop import History, Stopped, train

__all__ = ["CHECKPOINTS", "History", "Stopped", "check", "check_setup", "init_wandb", "logged", "total_steps", "train"]
