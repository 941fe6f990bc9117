"""How close a video is to its reference, how steady it is, and how sure we are of a mean over few prompts."""

from qvdjax.metrics.fidelity import PSNR_CEILING, psnr, relative_error, ssim
from qvdjax.metrics.random_features import frechet_distance, random_feature_distance, random_features
from qvdjax.metrics.statistics import Interval, bootstrap_interval, paired_difference, relative_difference
from qvdjax.metrics.temporal import flicker, frame_difference_energy

__all__ = [
    "PSNR_CEILING",
    "Interval",
    "bootstrap_interval",
    "flicker",
    "frame_difference_energy",
    "frechet_distance",
    "paired_difference",
    "psnr",
    "random_feature_distance",
    "random_features",
    "relative_difference",
    "relative_error",
    "ssim",
]
