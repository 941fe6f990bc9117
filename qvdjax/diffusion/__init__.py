"""Sampling: noise schedules, solvers, guidance and the jitted loop. Nothing here knows a model by name."""

from qvdjax.diffusion.euler import FlowMatchEuler
from qvdjax.diffusion.guidance import guided
from qvdjax.diffusion.noise import initial_noise
from qvdjax.diffusion.sampler import Compilation, SampleResult, compile_sampler, sample
from qvdjax.diffusion.schedule import Schedule
from qvdjax.diffusion.solvers import SOLVERS, Solver, get_solver
from qvdjax.diffusion.unipc import UniPCFlow

__all__ = [
    "SOLVERS",
    "Compilation",
    "FlowMatchEuler",
    "SampleResult",
    "Schedule",
    "Solver",
    "UniPCFlow",
    "compile_sampler",
    "get_solver",
    "guided",
    "initial_noise",
    "sample",
]
