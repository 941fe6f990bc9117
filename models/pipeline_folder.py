"""A pipeline as diffusers lays it out: `model_index.json`, and a folder for each component."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from qvdjax.checkpoint.folder import read_json
from qvdjax.errors import UserError

MODEL_INDEX = "model_index.json"
DENOISERS = ("transformer", "unet")


def is_pipeline_folder(path: str | os.PathLike) -> bool:
    """Whether a folder is a pipeline's."""
    return (Path(path) / MODEL_INDEX).is_file()


@dataclasses.dataclass(frozen=True)
class PipelineFolder:
    """A pipeline's components.

    Attributes:
        path: The folder.
        components: Name -> class in diffusers or transformers, of those that the index names.
        other_denoiser: A model folder that stands in for the pipeline's own, such as a quantized one.
    """

    path: Path
    components: Mapping[str, str]
    other_denoiser: Path | None = None

    @classmethod
    def open(cls, path: str | os.PathLike, other_denoiser: str | os.PathLike | None = None) -> Self:
        """Read the index.

        Raises:
            UserError: There is none, or it is damaged.
        """
        path = Path(path)
        if path.is_dir() and not is_pipeline_folder(path):
            raise UserError(
                f"{path} holds no {MODEL_INDEX}", remedy="name the folder of a whole pipeline, as diffusers saves it"
            )
        index = read_json(path / MODEL_INDEX)
        pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
        components = {name: kind for name, (_, kind) in pairs.items() if isinstance(kind, str)}
        return cls(path, components, None if other_denoiser is None else Path(other_denoiser))

    def component(self, name: str) -> Path:
        """The folder of a component; UserError where the index does not name it or it is not there."""
        if name not in self.components:
            raise UserError(
                f"{self.path / MODEL_INDEX} names no {name}",
                remedy=f"it names {', '.join(self.components) or 'nothing'}",
            )
        if not (self.path / name).is_dir():
            raise UserError(
                f"{self.path} lacks the folder {name}, of its {self.components[name]}", remedy="download it too"
            )
        return self.path / name

    @property
    def denoiser(self) -> Path:
        """The folder of the model that is sampled.

        Raises:
            UserError: There is none, or two that share the steps.
        """
        if self.other_denoiser is not None:
            return self.other_denoiser
        if "transformer_2" in self.components:
            raise UserError(
                f"{self.path} has two transformers that share the steps, which is not done here",
                remedy="use a pipeline of one",
            )
        return self.component(next((name for name in DENOISERS if name in self.components), DENOISERS[0]))
