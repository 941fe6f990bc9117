"""What can be typed after `qvdjax`: one frozen dataclass a verb, its docstrings the help text.

Imports the standard library and tyro only, so that `--help` answers at once: jax alone takes seconds to
import.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from experiments.cli.options import (
    FOLDERS,
    Common,
    Dir,
    Execution,
    Mesh,
    Names,
    Out,
    Processes,
    Prompts,
    Real,
    Sampler,
    Solver,
    Threshold,
    Whole,
    WholeOfFolder,
    hinted,
)  # fmt: skip

Dtype = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Convert(Common):
    """Convert a checkpoint to a diffusers-shaped model folder; reads diffusers' and Wan's own layout.

    A folder with a model_index.json is converted whole: transformer, text encoders, VAE, tokenizers, scheduler. Exit
    code 1 when a dry run finds something missing there.
    """

    source: Annotated[Positional[Path], arg(metavar="SRC")]
    """Folder or safetensors file to read."""
    target: Annotated[Positional[Path], arg(metavar="DST")]
    """New model folder, or folder of a whole pipeline."""
    component: hinted(str, "NAME", "all of them") = None
    """Of a whole pipeline the one component, transformer or unet, that alone becomes DST, a model folder."""
    motion_adapter: hinted(Path, "FOLDER", "SRC is a whole model") = None
    """AnimateDiff's motion modules (diffusers' MotionAdapter), to put into SRC, the UNet of Stable Diffusion 1.5."""
    dtype: hinted(Dtype, "{float64,float32,bfloat16,float16}", "the source's types") = None
    """Cast floating-point tensors to this type."""
    dry_run: bool = False
    """Check names, shapes and types only, and say what would be written; write nothing."""
    overwrite: bool = False
    """Replace DST if it is there already."""


@dataclass(frozen=True)
class Info(Common):
    """List every layer of a model folder: what it is, its bits, its bytes, and why."""

    dir: Dir
    """Model folder, quantized or not. No weights are read."""


@dataclass(frozen=True)
class Calibrate(Sampler, Prompts, Common):
    """Sample prompts and keep what the model was given, for `quantize --calibration`.

    The same command goes on where an interrupted one stopped.
    """

    dir: Dir
    """Full-precision model folder."""
    out: Out
    """Calibration folder."""
    count: Whole = 8
    """How many of the shipped prompts to use where none are given."""
    seeds: hinted(str, "SEEDS", "1000 for the first prompt, then 1001, ...") = None
    """Seeds of the initial noise, for every prompt each: one (7), a list (1,2,5) or a range (0-4)."""


@dataclass(frozen=True)
class Quantize(Processes, Common):
    """Quantize a model folder with a named recipe; or a pipeline's text encoder, image encoder or VAE.

    What is calibrated and reconstructed is kept in OUT.work; the same command goes on where an interrupted one stopped.
    """

    dir: Dir
    """Full-precision folder of a model, an encoder or a VAE."""
    out: Out
    """New model folder; must not exist yet."""
    recipe: Annotated[str, arg(metavar="NAME", aliases=["-r"])]
    """Recipe, <method>-w<bits>a<bits>; `qvdjax recipes` lists them."""
    calibration: hinted(Path, "DIR", "made from the shipped prompts if needed") = None
    """Folder made by `calibrate`."""
    other_sampler: bool = False
    """Take a calibration of another solver, schedule or number of frames than DIR's."""
    set: Annotated[Names, arg(metavar="KEY=VALUE")] = ()
    """Override one option of the recipe's method; may be repeated."""
    mesh: hinted(str, "AXES", "one device; of several processes, fsdp over all devices") = None
    """Devices as a mesh, such as fsdp=2,context=4; axes are data, fsdp, context and tensor."""
    overwrite: bool = False
    """Replace OUT if it is there already."""


@dataclass(frozen=True)
class Train(Processes, Common):
    """Train a model under a recipe's rounding towards itself in full precision, then quantize it.

    Quantization-aware training by the straight-through estimator or with learned quantizers, as the recipe says; an
    interrupted run goes on with --checkpoints and --resume.
    """

    dir: Dir
    """Full-precision model folder: the teacher, and where training starts."""
    out: Out
    """New model folder; must not exist yet."""
    recipe: Annotated[str, arg(metavar="NAME", aliases=["-r"])]
    """Recipe that needs no calibration, such as rtn-w4a4; `qvdjax recipes` lists them."""
    data: Annotated[Path, arg(metavar="DIR")]
    """Folder of precomputed latents and text embeddings; docs/formats.md describes it."""
    set: Annotated[Names, arg(metavar="KEY=VALUE")] = ()
    """Override one option of the recipe's method; may be repeated."""
    steps: Whole = 1000
    """Training steps in all."""
    batch: Whole = 8
    """Examples in a step."""
    learning_rate: Real = 1e-4
    """Peak learning rate; a hundredth of it is left at the last step."""
    warm_up: Whole = 50
    """Steps of linear warm-up."""
    data_weight: Real = 0.0
    """Weight of the distance to the data's own velocity, beside 1 for the teacher's."""
    seed: Whole = 0
    """Of the order of the examples, the noise and its levels."""
    mesh: Mesh = None
    """Devices as a mesh, such as data=2,fsdp=4; axes are data, fsdp, context and tensor."""
    accumulate: Whole = 1
    """Micro-batches that a step's batch is cut into, to need less memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What student and teacher compute in; weights and their optimizer are float32 always."""
    teacher: hinted(str, "NAME", "full precision") = None
    """Recipe by which the teacher is quantized, such as rtn-w8a16 or rtn-w8a8, to need less memory."""
    teacher_cache: hinted(Path, "DIR", "the teacher stays in memory") = None
    """Folder of the teacher's predictions, computed before training where they are missing; other runs with the same
    data, seed, batch and dtype may use them."""
    remat: bool = False
    """Recompute each block in the backward pass, to need less memory."""
    checkpoints: hinted(Path, "DIR", "none are kept") = None
    """Folder for training states (Orbax); the two newest are kept."""
    save_every: Whole = 500
    """Steps between two training states."""
    resume: bool = False
    """Go on from the newest state in --checkpoints; from the start where there is none."""
    log: hinted(Path, "FILE", "not written") = None
    """Append step, loss, gradient norm, learning rates and more to this file, one JSON object a line."""
    tensorboard: hinted(Path, "DIR", "not written") = None
    """Write the same numbers as curves for TensorBoard."""
    overwrite: bool = False
    """Replace OUT if it is there already."""


@dataclass(frozen=True)
class Tabulate(Solver, Common):
    """Replace layers that see the timestep alone by tables over one sampler's steps.

    Their weights are then neither stored nor read; the new folder can be sampled with these steps only.
    """

    dir: Dir
    """Model folder, quantized or not."""
    out: Out
    """New model folder; must not exist yet."""
    steps: WholeOfFolder = None
    """Sampler steps."""
    overwrite: bool = False
    """Replace OUT if it is there already."""


@dataclass(frozen=True)
class EncodePrompts(Common):
    """Encode prompts with the text encoder of a published pipeline, for `sample --context`."""

    dir: Dir
    """Pipeline folder of diffusers: model_index.json, text_encoder, tokenizer and what is sampled."""
    out: Out
    """FILE.safetensors; replaced if it is there already."""
    prompt: Annotated[Names, arg(metavar="TEXT", aliases=["-p"])] = ()
    """A prompt; may be repeated."""
    prompts: hinted(Path, "FILE", "those given by --prompt") = None
    """Text file with one prompt a line; empty lines are left out."""
    negative_prompt: hinted(str, "TEXT", "the family's published one") = None
    """What guidance moves away from."""
    image: hinted(Path, "FILE", "none") = None
    """Picture that becomes the first frame, of a pipeline that follows one; it is encoded beside the prompts."""
    video: hinted(str, "FxHxW", "as the family is published") = None
    """Frames, height and width in pixels of the video that follows the picture."""
    fps: hinted(float, "X", "7") = None
    """Frames a second that Stable Video Diffusion is told."""
    motion_bucket: hinted(float, "X", "127") = None
    """How much it is to move, 0 to 255."""
    noise_augmentation: hinted(float, "X", "0.02") = None
    """Deviation of the noise that is put on its picture."""
    recipe: hinted(str, "NAME", "full precision") = None
    """Quantize the text encoder first, such as rtn-w8a16: weights of 8 bits; it is read in full precision before."""
    dtype: hinted(Dtype, "{float64,float32,bfloat16,float16}", "the file's types") = None
    """Floating type of the encoder's weights."""
    mesh: Mesh = None
    """Devices as a mesh, such as fsdp=4; axes are data, fsdp, context and tensor."""
    batch: Whole = 4
    """Prompts encoded at once, at most."""


@dataclass(frozen=True)
class EncodeVideos(Common):
    """Encode a folder of clips and captions into the folder that `train` reads.

    The same command goes on where an interrupted one stopped, and may run in several processes at once; what is done is
    kept in OUT.work until all of it is. Exit code 1 when clips could not be encoded; they are named at the end.
    """

    clips: Annotated[Positional[Path], arg(metavar="CLIPS")]
    """Folder of videos; the caption of a/b.mp4 stands in a/b.txt, or in captions.json as {"a/b.mp4": "..."}."""
    pipeline: Annotated[Positional[Path], arg(metavar="PIPELINE")]
    """Pipeline folder of diffusers whose text encoder and VAE are used."""
    out: Out
    """New training folder; must not exist yet."""
    video: hinted(str, "FxHxW", "as the family is published") = None
    """Frames, height and width that are taken of every clip, in pixels, such as 81x480x832."""
    fps: hinted(float, "X", "the family's") = None
    """Frames a second that are taken of clips; 0 takes every frame."""
    draw: bool = False
    """Draw latents from the VAE's Gaussian instead of taking its mean."""
    dtype: hinted(Dtype, "{float64,float32,bfloat16,float16}", "the files' types") = None
    """Floating type of text encoder and VAE."""
    batch: Whole = 4
    """Captions encoded at once."""


@dataclass(frozen=True)
class Sample(Sampler, Prompts, Common):
    """Sample videos from a model folder; writes each with a JSON file beside it.

    Without prompts a folder with a pipeline.json takes the first shipped one.
    """

    dir: Dir
    """Model folder, quantized or not, or pipeline folder of diffusers."""
    output: Annotated[Path, arg(metavar="FILE", aliases=["-o"])]
    """FILE.mp4, or FILE.safetensors for the latents; several videos become FILE-<prompt>-<seed>.mp4."""
    denoiser: hinted(Path, "DIR", "the pipeline's own") = None
    """Model folder in the place of a pipeline's transformer or unet, such as a quantized one."""
    image: hinted(Path, "FILE", "none") = None
    """Picture that becomes the first frame, resized to the video's size, of a pipeline that follows one."""
    seeds: Annotated[str, arg(metavar="SEEDS")] = "0"
    """Seeds of the initial noise, for every prompt each: one (7), a list (1,2,5) or a range (0-4)."""
    execution: Execution = None
    """How quantized layers compute."""
    dtype: hinted(Dtype, "{float64,float32,bfloat16,float16}", "the file's types") = None
    """Floating type of the weights, a text encoder's too."""
    batch: Whole = 8
    """Videos computed at once, at most; fewer need less memory."""
    names: Literal["prompt", "vbench"] = "prompt"
    """Of several videos: FILE-<prompt>-<seed>.mp4, or <prompt>-<0, 1, ...>.mp4 in FILE's folder, as VBench has them."""
    video: hinted(str, "FxHxW", "as the family is published") = None
    """Frames, height and width of the video in pixels, such as 81x480x832, instead of the latents' sizes."""
    step_loop: bool = False
    """Loop over the steps in Python, with a live bar, instead of one compiled scan."""
    previews: hinted(int, "N", "none") = None
    """After every N steps write a picture of each video's middle frame as the model expects it, FILE-step-<steps>.png;
    implies --step-loop."""
    memory_limit: hinted(str, "SIZE", "none") = None
    """Memory of one device that is not to be exceeded, such as 12GiB: fewer videos at once and a VAE in tiles are
    chosen for it, by the compiler's account and before a weight is read."""
    one_batch: bool = False
    """Compute both branches of the guidance as one batch: fewer, larger products, and twice the activation memory."""
    float_attention_first: int = 0
    """So many first steps in which attention is not quantized, of a model whose attention is."""
    float_attention_last: int = 0
    """The same for the last steps."""
    fps: hinted(float, "X", FOLDERS) = None
    """Frames a second of the video; Stable Video Diffusion is told them."""
    motion_bucket: hinted(float, "X", "127") = None
    """How much Stable Video Diffusion is to move, 0 to 255."""
    noise_augmentation: hinted(float, "X", "0.02") = None
    """Deviation of the noise that is put on its picture."""
    scale: hinted(int, "N", "small videos to about 288 pixels") = None
    """Enlarge the video by this whole factor."""


@dataclass(frozen=True)
class Compare(Common):
    """Put videos side by side in one, each below its label."""

    videos: Annotated[Positional[tuple[Path, ...]], arg(metavar="VIDEO")]
    """Two videos or more, of one size and as many frames."""
    output: Annotated[Path, arg(metavar="FILE", aliases=["-o"])]
    """FILE.mp4; replaced if it is there already."""
    label: Annotated[Names, arg(metavar="TEXT", help_behavior_hint="(default: the files' names)")] = ()
    """A label; repeated, one a video in their order."""
    columns: hinted(int, "N", "all in one row") = None
    """Videos in a row."""
    fps: hinted(float, "X", "the first video's") = None
    """Frames a second."""


@dataclass(frozen=True)
class Evaluate(Sampler, Prompts, Common):
    """Compare two models at the same seeds; writes metrics.json and an HTML report.

    Exit code 1 when a threshold given here is missed.
    """

    reference: Annotated[Positional[Path], arg(metavar="REFERENCE")]
    """Model folder to compare with, full precision as a rule."""
    candidate: Annotated[Positional[Path], arg(metavar="CANDIDATE")]
    """Model folder to judge."""
    output: Annotated[Path, arg(metavar="REPORT_DIR", aliases=["-o"])]
    """Folder for metrics.json, report.html and the videos; an older report there is replaced."""
    count: Whole = 8
    """How many of the shipped prompts to use where none are given."""
    seeds: hinted(str, "SEEDS", "0 for the first prompt, then 1, 2, ...") = None
    """Seeds of the initial noise, for every prompt each: one (7), a list (1,2,5) or a range (0-4)."""
    batch: hinted(int, "N", "all") = None
    """Videos computed at once; fewer need less memory."""
    execution: Execution = None
    """How quantized layers compute."""
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
class Web(Common):
    """Serve a page that samples two models from the same noise and plays their videos side by side.

    Needs the extra `web`. Ctrl-C ends it.
    """

    reference: Annotated[Positional[Path], arg(metavar="REFERENCE")]
    """Model folder with a pipeline.json, full precision as a rule, or pipeline folder of diffusers."""
    candidate: Annotated[Positional[Path], arg(metavar="CANDIDATE")]
    """Model folder of the same architecture and size, such as a quantized one."""
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: Whole = 7860
    """Port to listen at."""
    video: hinted(str, "FxHxW", "as the family is published") = None
    """Frames, height and width of the videos of a pipeline folder in pixels, such as 81x480x832."""
    execution: Execution = None
    """How quantized layers compute."""


@dataclass(frozen=True)
class Score(Common):
    """Score videos by the field's metrics, with weights that are named here; what lacks its weights has no number."""

    videos: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of mp4 files, as `sample` writes them."""
    reference: hinted(Path, "DIR", "none") = None
    """Folder of videos of the same names, for PSNR, SSIM and LPIPS; FVD compares the folders."""
    clip: hinted(Path, "DIR", "no CLIP similarity") = None
    """Folder of a CLIPModel of transformers, with its tokenizer and preprocessor_config.json."""
    lpips: hinted(Path, "DIR", "no LPIPS") = None
    """Folder with alexnet-owt-7be5be79.pth and LPIPS' alex.pth; needs PyTorch."""
    i3d: hinted(Path, "FILE", "no FVD") = None
    """i3d_torchscript.pt; needs PyTorch."""
    output: Annotated[Path | None, arg(metavar="FILE.json", aliases=["-o"])] = None
    """Also write the scores, of every video too, to this file."""


@dataclass(frozen=True)
class VBench(Common):
    """Normalise and weigh the scores that VBench's own program wrote; `sample --names vbench` makes its videos."""

    results: Annotated[Positional[tuple[Path, ...]], arg(metavar="RESULT")]
    """Files *_eval_results.json of VBench, or folders of them; each dimension once."""


@dataclass(frozen=True)
class Bench(Common):
    """Time quantized against full-precision layers, alternating, at named shapes.

    Exit code 1 when a case failed.
    """

    suite: Annotated[str, arg(metavar="NAME")] = "default"
    """Shapes to time: full for all, from kernels to videos, beside other programs; default for what suits this device;
    or one of tiny, wan2.1-1.3b-480p, wan2.1-14b-480p, wan2.1-1.3b-720p, wan2.1-14b-720p, cogvideox-2b-480p,
    cogvideox-5b-480p, hunyuanvideo-720p, animatediff-512 and the tiny ones of other families."""
    recipe: Annotated[Names, arg(metavar="NAME", help_behavior_hint="(default: rtn-w8a8 and rtn-w4a8)")] = ()
    """Quantization to time; may be repeated."""
    repeats: Whole = 7
    """Rounds of the alternation."""
    budget: Annotated[float, arg(metavar="SECONDS")] = math.inf
    """Begin no new case after this many seconds."""
    output: hinted(Path, "FILE.json", "not written") = None
    """Also write the results to this file, whole after every case."""


@dataclass(frozen=True)
class Plan(Common):
    """Compile a step for a TPU slice without having one: does it fit, and what does it communicate."""

    model: Annotated[str, arg(metavar="NAME")]
    """Named configuration (wan2.1-t2v-1.3b, wan2.1-t2v-14b, cogvideox-2b, cogvideox-5b, hunyuanvideo,
    animatediff) or a model folder."""
    recipe: Annotated[str, arg(metavar="NAME", aliases=["-r"])]
    """Recipe, or `none` for bfloat16."""
    topology: Annotated[str, arg(metavar="NAME")]
    """TPU slice, <generation>:<chips>x<chips>, such as v5e:2x4."""
    batch: Whole = 1
    """Videos in the global batch."""
    mesh: hinted(str, "AXES", "tokens and weights over all chips") = None
    """Mesh of the slice, such as fsdp=2,context=4."""
    step: Literal["sample", "train", "reconstruct"] = "sample"
    """One forward pass of the model; one step of `qvdjax train`, teacher included; or one step of a block's
    reconstruction by `qvdjax quantize`."""
    size: hinted(str, "{480p,720p,512}", "the family's usual one") = None
    """Size of the videos: of 81 frames, CogVideoX's of 49, HunyuanVideo's of 129, AnimateDiff's of 16."""
    accumulate: Whole = 1
    """Micro-batches that a training step's batch is cut into."""
    set: Annotated[Names, arg(metavar="KEY=VALUE")] = ()
    """Override one option of the recipe's method; may be repeated."""
    teacher: hinted(str, "NAME", "bfloat16") = None
    """Recipe by which the teacher of a training step is quantized."""
    teacher_cache: bool = False
    """Read the teacher's predictions with the batch, so that a training step has no teacher."""
    effort: hinted(float, "X", "the compiler's usual one") = None
    """How much the compiler tries, -1 to 1: with -1 a UNet takes a minute in the place of many, and its program more
    memory and time."""


@dataclass(frozen=True)
class Export(Common):
    """Write a model folder in another format."""

    dir: Dir
    """Model folder, quantized or not."""
    out: Out
    """New folder; must not exist yet."""
    format: Annotated[str, arg(metavar="NAME")]
    """diffusers, wan-original or hunyuanvideo-original (quantized weights dequantized), or compressed-tensors (codes
    kept)."""
    dtype: hinted(Dtype, "{float64,float32,bfloat16,float16}", "the folder's types") = None
    """Cast floating-point tensors to this type."""
    overwrite: bool = False
    """Replace OUT if it is there already."""


@dataclass(frozen=True)
class Recipes(Common):
    """List the recipes."""


Command = (
    Annotated[Convert, subcommand("convert")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Quantize, subcommand("quantize")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Tabulate, subcommand("tabulate")]
    | Annotated[EncodePrompts, subcommand("encode-prompts")]
    | Annotated[EncodeVideos, subcommand("encode-videos")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Web, subcommand("web")]
    | Annotated[Score, subcommand("score")]
    | Annotated[VBench, subcommand("vbench")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Recipes, subcommand("recipes")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Plan, subcommand("plan")]
)
