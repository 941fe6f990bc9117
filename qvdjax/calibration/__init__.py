"""What a model meets while it samples, and what can be learnt from it before quantizing."""

from qvdjax.calibration.dataset import CalibrationSet, Trajectory, collect, read_trajectory
from qvdjax.calibration.moments import second_moments
from qvdjax.calibration.ranges import input_ranges

__all__ = ["CalibrationSet", "Trajectory", "collect", "input_ranges", "read_trajectory", "second_moments"]
