"""From a prompt to an mp4 without PyTorch, of folders that diffusers wrote, against the frames it samples itself."""

import numpy as np
import pytest
from diffusers_pipelines import DIFFUSERS, sample_with_diffusers, sample_without_pytorch

import conversion
from qvdjax.video import read_mp4


def same_in_diffusers(one, other):
    """Whether two folders are the same pipeline to diffusers, weight by weight."""
    import diffusers

    pipelines = [diffusers.DiffusionPipeline.from_pretrained(folder) for folder in (one, other)]
    modules = [{n: part for n, part in p.components.items() if hasattr(part, "state_dict")} for p in pipelines]
    assert modules[0].keys() == modules[1].keys() >= {"text_encoder", "vae"}
    for name, module in modules[0].items():
        ours, theirs = module.state_dict(), modules[1][name].state_dict()
        if ours.keys() != theirs.keys() or not all(ours[key].equal(theirs[key]) for key in ours):
            return False
    return True


@pytest.mark.slow  # five pipelines are compiled, and PyTorch and diffusers imported
def test_the_frames_of_diffusers_pipelines(tmp_path):
    sample_with_diffusers(tmp_path)
    sample_without_pytorch(tmp_path)
    for family, case in DIFFUSERS.items():
        ours, theirs = (np.load(tmp_path / f"{family}-{who}.npy") for who in ("ours", "theirs"))
        assert ours.shape == theirs.shape == (*case["pixels"], 3)
        assert ((theirs > 0) & (theirs < 1)).mean() > 0.2  # clipped videos would agree where others do not
        assert theirs.std() > 0.05
        psnr = -10 * np.log10(np.mean((ours - theirs) ** 2))
        print(f"{family}: PSNR {psnr:.1f} dB")
        # Both compute in float32. A relative error of 1e-6 after the encoder, three steps of a random model and its
        # guidance, and the decoder would be 110 dB; a wrong constant anywhere is below 40.
        assert psnr >= 50, family
        assert read_mp4(tmp_path / f"{family}.mp4").frames.shape[0] == case["pixels"][0]
    for family in ("animatediff", "wan-i2v"):  # every kind of component is in one of them
        conversion.convert(tmp_path / family, tmp_path / f"{family}-converted")
        assert same_in_diffusers(tmp_path / family, tmp_path / f"{family}-converted"), family
