"""What can be typed after `qvdjax`: one frozen dataclass a verb, its docstrings the help text.

Imports the standard library and tyro only, so that `--help` answers at once: jax alone takes seconds to
import.
"""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

Names = UseAppendAction[tuple[str, ...]]
FromFolder = "(default: the model folder's)"
NoThreshold = "(default: not checked)"
Whole = Annotated[int | None, arg(metavar="N", help_behavior_hint=FromFolder)]
Real = Annotated[float | None, arg(metavar="X", help_behavior_hint=FromFolder)]
Threshold = Annotated[float | None, arg(metavar="X", help_behavior_hint=NoThreshold)]
Execution = Annotated[
    Literal["simulate", "integer"] | None,
    arg(metavar="{simulate,integer}", help_behavior_hint="(default: best on this device)"),
]
Mesh = Annotated[str | None, arg(metavar="AXES", help_behavior_hint="(default: one device)")]


@dataclass(frozen=True)
class Common:
    """Options every verb takes."""

    _: KW_ONLY
    json: bool = False
    """Print exactly one JSON object on stdout and nothing else there."""
    debug: bool = False
    """Show the traceback of an error, and Python's and jax's warnings."""


@dataclass(frozen=True)
class Convert(Common):
    """Convert a checkpoint to a diffusers-shaped model folder; reads diffusers' and Wan's own layout."""

    source: Annotated[Positional[Path], arg(metavar="SRC")]
    """Folder or safetensors file to read."""
    target: Annotated[Positional[Path], arg(metavar="DST")]
    """New model folder."""
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"] | None,
        arg(metavar="{float64,float32,bfloat16,float16}", help_behavior_hint="(default: the source's types)"),
    ] = None
    """Cast floating-point tensors to this type."""
    dry_run: bool = False
    """Check names, shapes and types only; write nothing."""
    overwrite: bool = False
    """Replace DST if it is there already."""


@dataclass(frozen=True)
class Info(Common):
    """List every layer of a model folder: what it is, its bits, its bytes, and why."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Model folder, quantized or not. No weights are read."""


@dataclass(frozen=True)
class Sampling:
    """Options of the verbs that run the sampler; what is not given is taken from the model folder."""

    _: KW_ONLY
    prompt: Annotated[Names, arg(metavar="TEXT", aliases=["-p"])] = ()
    """A prompt; may be repeated."""
    prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the shipped ones)")] = (
        None
    )
    """Text file with one prompt a line."""
    seeds: Annotated[
        str | None,
        arg(metavar="SEEDS", help_behavior_hint="(default: the first prompt's is 0, the next's 1, ...)"),
    ] = None
    """Seeds of the initial noise for every prompt: one (7), a list (1,2,5) or a range (0-4)."""
    steps: Whole = None
    """Sampler steps."""
    guidance_scale: Real = None
    """Strength of classifier-free guidance; 1 turns it off."""


@dataclass(frozen=True)
class Calibrate(Sampling, Common):
    """Run the model on prompts and keep what its blocks saw, for `quantize --calibration`."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Full-precision model folder."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """New calibration folder; must not exist yet."""


@dataclass(frozen=True)
class Quantize(Common):
    """Quantize a model folder with a named recipe."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Full-precision model folder."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """New model folder; must not exist yet."""
    recipe: Annotated[str, arg(metavar="NAME", aliases=["-r"])]
    """Recipe, <method>-w<bits>a<bits>; `qvdjax recipes` lists them."""
    calibration: Annotated[
        Path | None,
        arg(metavar="DIR", help_behavior_hint="(default: made from the shipped prompts if needed)"),
    ] = None
    """Folder made by `calibrate`."""
    set: Annotated[Names, arg(metavar="KEY=VALUE")] = ()
    """Override one option of the recipe's method; may be repeated."""
    overwrite: bool = False
    """Replace OUT if it is there already."""


@dataclass(frozen=True)
class Sample(Sampling, Common):
    """Sample a video from a model folder; writes the mp4 and a JSON file beside it."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Model folder, quantized or not."""
    output: Annotated[Path, arg(metavar="FILE.mp4", aliases=["-o"])]
    """Video to write; several prompts or seeds become numbered files beside this name."""
    negative_prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint=FromFolder)] = None
    """What guidance moves away from."""
    solver: Annotated[
        Literal["unipc", "euler"] | None, arg(metavar="{unipc,euler}", help_behavior_hint=FromFolder)
    ] = None
    """Sampler."""
    shift: Real = None
    """Shift of the noise schedule towards high noise."""
    execution: Execution = None
    """How quantized layers compute."""
    mesh: Mesh = None
    """Devices as a mesh, such as data=2,fsdp=4; axes are data, fsdp, context and tensor."""
    step_loop: bool = False
    """Loop over the steps in Python, with a live bar, instead of one compiled scan."""


@dataclass(frozen=True)
class Evaluate(Sampling, Common):
    """Compare two models at the same seeds; writes metrics.json and an HTML report.

    Exit code 1 when a threshold given here is missed.
    """

    reference: Annotated[Positional[Path], arg(metavar="REFERENCE")]
    """Model folder to compare with, full precision as a rule."""
    candidate: Annotated[Positional[Path], arg(metavar="CANDIDATE")]
    """Model folder to judge."""
    output: Annotated[Path, arg(metavar="REPORT_DIR", aliases=["-o"])]
    """Folder for metrics.json, report.html and the videos; an older report there is replaced."""
    count: Annotated[int, arg(metavar="N")] = 8
    """How many of the shipped prompts to use where none are given."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Videos sampled at once; fewer need less memory."""
    execution: Execution = None
    """How quantized layers compute."""
    mesh: Mesh = None
    """Devices as a mesh, such as data=2,fsdp=4; axes are data, fsdp, context and tensor."""
    max_teacher_forced_error: Threshold = None
    """Largest relative squared error of the prediction, same latents given to both, that passes."""
    max_trajectory_error: Threshold = None
    """Largest relative squared error of the final latents, each model on its own path, that passes."""
    min_psnr: Threshold = None
    """Smallest PSNR to the reference's videos that passes, in dB."""
    min_ssim: Threshold = None
    """Smallest SSIM to the reference's videos that passes, 0 to 1."""
    min_oracle: Threshold = None
    """Smallest share of videos with the prompted colour, shape and direction, each, that passes, 0 to 1."""
    max_bytes_ratio: Threshold = None
    """Largest ratio of the candidate's weight bytes to the reference's that passes."""


@dataclass(frozen=True)
class Bench(Common):
    """Time quantized against full-precision layers, alternating, at named shapes."""

    suite: Annotated[str, arg(metavar="NAME")] = "tiny"
    """Shapes to time: tiny, wan2.1-1.3b-480p or wan2.1-14b-480p."""
    output: Annotated[
        Path | None, arg(metavar="FILE.json", aliases=["-o"], help_behavior_hint="(default: not written)")
    ] = None
    """Also write the results to this file."""


@dataclass(frozen=True)
class Plan(Common):
    """Compile a step for a TPU slice without having one: does it fit, and what does it communicate."""

    model: Annotated[str, arg(metavar="NAME")]
    """Named configuration (wan2.1-1.3b, wan2.1-14b) or a model folder."""
    recipe: Annotated[str, arg(metavar="NAME", aliases=["-r"])]
    """Recipe, or `none` for bfloat16."""
    topology: Annotated[str, arg(metavar="NAME")]
    """TPU slice, <generation>:<chips>x<chips>, such as v5e:2x4."""
    batch: int = 1
    """Clips in the global batch."""
    mesh: Annotated[str | None, arg(metavar="AXES", help_behavior_hint="(default: every chip on fsdp)")] = (
        None
    )
    """Mesh of the slice, such as data=2,fsdp=4."""
    step: Literal["sample", "train"] = "sample"
    """One denoising step, or one training step."""


@dataclass(frozen=True)
class Export(Common):
    """Write a model folder in another format."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """Model folder, quantized or not."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """New folder; must not exist yet."""
    format: Annotated[str, arg(metavar="NAME")]
    """diffusers (dequantized) or compressed-tensors."""


@dataclass(frozen=True)
class Recipes(Common):
    """List the recipes."""


Command = (
    Annotated[Convert, subcommand("convert")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Quantize, subcommand("quantize")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Plan, subcommand("plan")]
)
