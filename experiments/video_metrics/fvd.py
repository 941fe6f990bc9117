"""Features of videos for FVD (arXiv 1812.01717): the logits of I3D trained on Kinetics-400.

The network is the TorchScript file of StyleGAN-V, in which it was read how it is called; frames are prepared as in
JunyaoHu/common_metrics_on_video_quality `fvd/styleganv/fvd.py`. Other files and other preparations give other numbers.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.video_metrics.weights import I3D, pytorch
from qvdjax.errors import UserError

SIDE, LEAST_FRAMES = 224, 10


def load_i3d(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The network, from its file or the folder with it.

    Returns:
        A function of a video, uint8 (frames, height, width, rgb), that gives its features (400,).

    Raises:
        UserError: The file is missing or another one, or PyTorch is not installed.
    """
    file = I3D.checked(path)
    torch = pytorch("FVD")
    network = torch.jit.load(file, map_location="cpu").eval()  # it runs code of the file, whose hash was checked

    def measure(video: np.ndarray) -> np.ndarray:
        if len(video) < LEAST_FRAMES:
            raise UserError(
                f"I3D takes {LEAST_FRAMES} frames at least, not {len(video)}", remedy="sample longer videos"
            )
        frames = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float() / 255  # f h w c -> f c h w
        side = SIDE / min(frames.shape[2:])
        size = tuple(max(SIDE, -int(-length * side // 1)) for length in frames.shape[2:])
        frames = torch.nn.functional.interpolate(frames, size=size, mode="bilinear", align_corners=False)
        top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
        frames = frames[:, :, top : top + SIDE, left : left + SIDE] * 2 - 1
        with torch.no_grad():
            given = frames.permute(1, 0, 2, 3)[None]  # f c h w -> 1 c f h w
            return network(given, rescale=False, resize=False, return_features=True)[0].numpy()

    return measure
