"""Training on latents: the step, its data and its states, and the job behind `qvdjax train`."""

from experiments.training.job import train_folder

__all__ = ["train_folder"]
