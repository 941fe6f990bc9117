"""The job behind `qvdjax score`: the field's own metrics of videos, with weights that the user names."""

from experiments.video_metrics.job import score_videos

__all__ = ["score_videos"]
