"""Pictures prepared for CLIP and for a VAE as transformers and diffusers do it, and files that are none."""

import numpy as np
import pytest
from PIL import Image

from models.images import for_clip, for_clip_smoothed, for_vae, read_image
from qvdjax.errors import UserError

PICTURE = np.random.default_rng(0).integers(0, 255, (37, 52, 3), np.uint8)


@pytest.mark.slow  # imports transformers and diffusers
def test_pictures_are_prepared_as_the_pipelines_do():
    from diffusers.video_processor import VideoProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    for picture in (PICTURE, PICTURE.transpose(1, 0, 2)):
        for config in (
            {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
            {"size": {"height": 14, "width": 18}, "crop_size": {"height": 12, "width": 12}},
            {"size": {"shortest_edge": 9}, "crop_size": {"height": 12, "width": 12}},  # black around it
        ):
            theirs = CLIPImageProcessorPil(**config)(images=Image.fromarray(picture), return_tensors="np")
            np.testing.assert_allclose(
                for_clip(picture, config), theirs["pixel_values"][0].transpose(1, 2, 0), atol=1e-6
            )
        theirs = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(picture), height=32, width=48)
        np.testing.assert_allclose(for_vae(picture, 32, 48), theirs[0].numpy().transpose(1, 2, 0), atol=1e-6)


@pytest.mark.slow  # imports diffusers
def test_pictures_are_smoothed_as_the_pipeline_of_a_picture_alone_does():
    import torch
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for size in ((37, 52), (5, 200), (224, 230), (300, 9)):
        picture = np.random.default_rng(1).integers(0, 255, (*size, 3), np.uint8)
        given = torch.tensor(picture.transpose(2, 0, 1)[None] / 255, dtype=torch.float32) * 2 - 1
        theirs = (_resize_with_antialiasing(given, (28, 28)) + 1) / 2
        # Sums of some dozen float32 products of numbers up to 1.
        ours = for_clip_smoothed(picture, 28, plain)
        np.testing.assert_allclose(ours, theirs[0].numpy().transpose(1, 2, 0), atol=1e-5)


def test_smoothing_keeps_what_needs_none():
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    # Of its size already: neither blurred nor moved; of one colour: that colour, edges too. Float32 rounding.
    np.testing.assert_allclose(for_clip_smoothed(PICTURE[:, :37], 37, plain), PICTURE[:, :37] / 255, atol=1e-6)
    grey = for_clip_smoothed(np.full((90, 7, 3), 51, np.uint8), 16, plain)
    np.testing.assert_allclose(grey, 0.2, atol=1e-6)
    assert for_clip_smoothed(np.zeros((1, 1, 3), np.uint8), 16, {}).shape == (16, 16, 3)
    with pytest.raises(UserError, match="does not say how images are prepared"):
        for_clip_smoothed(PICTURE, 16, {"image_mean": "grey"})


def test_what_a_processor_leaves_out_is_clips():
    pixels = for_clip(PICTURE, {"size": 30, "crop_size": 20, "image_std": None})
    assert pixels.shape == (20, 20, 3)
    assert for_clip(PICTURE, {}).shape == (224, 224, 3)
    plain = for_clip(PICTURE, {"do_resize": False, "do_center_crop": False, "do_normalize": False})
    np.testing.assert_allclose(plain, PICTURE / 255, atol=1e-6)
    with pytest.raises(UserError, match="does not say how images are prepared"):
        for_clip(PICTURE, {"size": {"longest": 3}})


def test_files_are_read_without_transparency_and_upright(tmp_path):
    Image.fromarray(PICTURE).convert("RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), PICTURE)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(PICTURE).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (52, 37, 3)


def test_what_is_no_picture_is_said(tmp_path):
    with pytest.raises(UserError, match="does not exist or is no file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"the image .*text.png cannot be read: .*; save it again, as PNG or JPEG"):
        read_image(tmp_path / "text.png")
    Image.fromarray(PICTURE).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path / "cut.png")
