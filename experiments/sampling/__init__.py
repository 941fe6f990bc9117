"""The job behind `qvdjax sample`: from a model folder and prompts to videos and a record of their making."""

from experiments.sampling.job import sample_folder

__all__ = ["sample_folder"]
