"""The job behind `qvdjax encode-videos`: from clips and captions to the folder that training reads."""

from experiments.video_encoding.job import encode_videos

__all__ = ["encode_videos"]
