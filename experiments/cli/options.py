"""Options that several verbs share: base classes of those in `arguments`. Standard library and tyro only."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg


def hinted(kind, metavar: str, default: str):
    """An optional value; `default` says in the help what happens without it."""
    return Annotated[kind | None, arg(metavar=metavar, help_behavior_hint=f"(default: {default})")]


FOLDERS = "the model folder's"
Dir = Annotated[Positional[Path], arg(metavar="DIR")]
Out = Annotated[Positional[Path], arg(metavar="OUT")]
Names = UseAppendAction[tuple[str, ...]]
Whole = Annotated[int, arg(metavar="N")]
Real = Annotated[float, arg(metavar="X")]
WholeOfFolder = hinted(int, "N", FOLDERS)
RealOfFolder = hinted(float, "X", FOLDERS)
Threshold = hinted(float, "X", "not checked")
Execution = hinted(Literal["simulate", "integer"], "{simulate,integer}", "best on this device")
Mesh = hinted(str, "AXES", "one device")


@dataclass(frozen=True)
class Common:
    """Options of every verb."""

    _: KW_ONLY
    json: bool = False
    """Print exactly one JSON object on stdout and nothing else there."""
    debug: bool = False
    """Show the traceback of an error, and Python's and jax's warnings."""


@dataclass(frozen=True)
class Processes:
    """Several processes, as a rule one a host, that run the same command together; see docs/train.md."""

    _: KW_ONLY
    distributed: bool = False
    """Join the processes that the cluster has started: TPU pods, Slurm, Open MPI, Kubernetes. Elsewhere give the
    three options below."""
    coordinator_address: hinted(str, "HOST:PORT", "found with --distributed") = None
    """Where process 0 answers the others; any free port of its host."""
    num_processes: hinted(int, "N", "found with --distributed") = None
    """How many processes there are."""
    process_id: hinted(int, "I", "found with --distributed") = None
    """Number of this process, 0 to N-1; process 0 writes the files and shows the progress."""


@dataclass(frozen=True)
class Prompts:
    """What is sampled, for how many steps."""

    _: KW_ONLY
    prompt: Annotated[Names, arg(metavar="TEXT", aliases=["-p"])] = ()
    """A prompt; may be repeated."""
    prompts: hinted(Path, "FILE", "the shipped ones") = None
    """Text file with one prompt a line."""
    steps: WholeOfFolder = None
    """Sampler steps."""
    guidance_scale: RealOfFolder = None
    """Strength of classifier-free guidance; 1 turns it off."""


@dataclass(frozen=True)
class Solver:
    """The steps that the sampler takes."""

    _: KW_ONLY
    solver: hinted(
        Literal["unipc", "euler", "ddim", "dpm-sde", "euler-edm"], "{unipc,euler,ddim,dpm-sde,euler-edm}", FOLDERS
    ) = None
    """Sampler: unipc and euler for flow matching; ddim and, with noise at every step, dpm-sde for
    variance-preserving models such as CogVideoX; euler-edm for Stable Video Diffusion."""
    sigma_grid: hinted(Literal["original", "diffusers"], "{original,diffusers}", "original") = None
    """Noise levels of unipc: those of Wan's own code or of diffusers."""
    shift: RealOfFolder = None
    """Shift of the noise schedule towards high noise, of unipc and euler."""


@dataclass(frozen=True)
class Sampler(Solver):
    """How it is sampled."""

    _: KW_ONLY
    negative_prompt: hinted(str, "TEXT", FOLDERS) = None
    """What guidance moves away from."""
    context: hinted(Path, "FILE", "prompts are encoded by the folder") = None
    """Safetensors with the text embeddings context and negative_context, (tokens, dim) each, for a model
    folder without pipeline.json; `encode-prompts` makes it."""
    dynamic_guidance: hinted(Literal["timestep", "step"], "{timestep,step}", "the same at every step") = None
    """Let the guidance vary over the steps: as CogVideoX's programs do, by the timestep, or smoothly."""
    guidance_until: Real = 0.0
    """Timestep (0..1000) below which steps are not guided; 400 is DSAQuant's, its last nine of fifty steps."""
    first_frame_guidance: hinted(Real, "FLOAT", "the folder's, or as in all frames") = None
    """Guidance scale of the first frame, from which it rises evenly to the guidance scale in the last."""
    frames: WholeOfFolder = None
    """Frames of the latents (not of the video)."""
    height: WholeOfFolder = None
    """Height of the latents."""
    width: WholeOfFolder = None
    """Width of the latents."""
    mesh: Mesh = None
    """Devices as a mesh, such as data=2,fsdp=4; axes are data, fsdp, context and tensor."""
