"""The folder that is sampled, and what of its pipeline takes part."""

import dataclasses
from pathlib import Path

import models
from experiments.sampling.conditions import IMAGE_ALONE
from experiments.sampling.decoding import VAE, check_vae
from experiments.sampling.output import VIDEO, check_output
from models.pipeline import FILE
from models.pipeline_folder import PipelineFolder, is_pipeline_folder
from models.prompts import PromptEncoder
from qvdjax.errors import UserError
from qvdjax.nn import Execution, VideoModel


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """What is sampled, looked at before a weight is read.

    Attributes:
        folder: Of the model that samples.
        skeleton: The model as shapes.
        whole: The pipeline that it is part of, None for a folder of its own.
        encoder: What encodes prompts, None where they come otherwise or the model follows none.
        vae: Folder of what makes videos or pictures of latents; None where nothing has to, or a `pipeline.json` does.
        execution: How products are to be computed, see `models.load`.
    """

    folder: Path
    skeleton: VideoModel
    whole: PipelineFolder | None
    encoder: PromptEncoder | None
    vae: Path | None
    execution: Execution | None


def open_sampled(
    folder: Path, output: Path, denoiser: Path | None, *, encodes: bool, execution: Execution | None, shows: bool
) -> Opened:
    """Look at a folder and whether its latents can become the output.

    Args:
        folder, output, denoiser, execution: See `sample_folder`.
        encodes: Whether the pipeline encodes what the model follows.
        shows: Whether latents become pictures on the way.

    Raises:
        UserError: A missing or corrupt folder; a denoiser without a pipeline that it stands in for; an output that
            cannot be written, or that nothing can make of latents.
    """
    encoder = whole = vae = None
    if is_pipeline_folder(folder):
        whole = PipelineFolder.open(folder, denoiser)
        folder = whole.denoiser
    elif denoiser is not None:
        raise UserError(
            f"{folder} is no pipeline whose model could be replaced", remedy=f"name {denoiser} alone, or a pipeline"
        )
    skeleton = models.skeleton(folder, execution=execution)
    if whole is not None and encodes and IMAGE_ALONE not in skeleton.config.conditions:
        encoder = PromptEncoder.open(whole)
    own, has_vae = (folder / FILE).exists(), whole is not None and VAE in whole.components
    check_output(output, decodes=own or has_vae)
    if (output.suffix == VIDEO or shows) and not own:
        if not has_vae:
            raise UserError(f"nothing in {folder} decodes latents to pictures", remedy="leave out --previews")
        vae = check_vae(whole, skeleton.config)
    return Opened(folder, skeleton, whole, encoder, vae, execution)
