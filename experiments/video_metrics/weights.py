"""Files of weights that metrics are defined by: their names and hashes, which are checked before they are opened."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A published file.

    Attributes:
        names: What it is called, by the one or the other.
        sha256: Its hash.
        source: Where it comes from.
    """

    names: tuple[str, ...]
    sha256: str
    source: str

    def checked(self, folder: Path) -> Path:
        """Its path, once its hash was found right; `folder` is the file itself or holds it.

        Raises:
            UserError: It is not there, or another one.
        """
        paths = [folder] if folder.is_file() else [folder / name for name in self.names]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"{folder} holds no {self.names[0]}", remedy=f"download it from {self.source}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{path} is not the file that the metric is defined by: its SHA-256 is {found}, not {self.sha256}",
                remedy=f"download it from {self.source}",
            )
        return path


ALEXNET = WeightFile(
    ("alexnet-owt-7be5be79.pth",), "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)  # fmt: skip
LPIPS_HEADS = WeightFile(
    ("alex.pth", "LPIPS_v0.1_alex-df73285e.pth"), "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "https://github.com/richzhang/PerceptualSimilarity (lpips/weights/v0.1)",
)  # fmt: skip
I3D = WeightFile(
    ("i3d_torchscript.pt",), "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    "https://huggingface.co/flateon/FVD-I3D-torchscript",
)  # fmt: skip


def pytorch(metric: str) -> Any:
    """PyTorch, which the published files are read with. Raises `UserError` where it is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{metric} is defined by a file of PyTorch, which is not installed", remedy='pip install "qvdjax[eval]"'
        ) from None
    return torch
