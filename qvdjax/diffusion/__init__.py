"""Sampling: noise schedules, solvers, guidance and the jitted loop. Nothing here knows a model by name."""

from qvdjax.diffusion.ddim import DDIM
from qvdjax.diffusion.dpm_sde import DPMSolverSDE
from qvdjax.diffusion.edm import EulerEDM
from qvdjax.diffusion.euler import FlowMatchEuler
from qvdjax.diffusion.examples import Example
from qvdjax.diffusion.guidance import guidance_scales, guided, guided_steps
from qvdjax.diffusion.noise import initial_noise
from qvdjax.diffusion.sampler import Compilation, Precise, SampleResult, compile_sampler, sample
from qvdjax.diffusion.schedule import Schedule
from qvdjax.diffusion.solvers import SOLVERS, Solver, get_solver, related_solver, solver_name
from qvdjax.diffusion.unipc import UniPCFlow

__all__ = [
    "DDIM",
    "SOLVERS",
    "Compilation",
    "DPMSolverSDE",
    "EulerEDM",
    "Example",
    "FlowMatchEuler",
    "Precise",
    "SampleResult",
    "Schedule",
    "Solver",
    "UniPCFlow",
    "compile_sampler",
    "get_solver",
    "guidance_scales",
    "guided",
    "guided_steps",
    "initial_noise",
    "related_solver",
    "sample",
    "solver_name",
]
