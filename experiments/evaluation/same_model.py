"""Whether two folders hold the same architecture at the same size."""

from pathlib import Path

import models
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.errors import UserError


def check_same_model(reference: Path, candidate: Path) -> None:
    """Refuse to compare models that cannot be given the same inputs, or are not versions of one model.

    Raises:
        UserError: A folder is missing or corrupt; the architectures differ; a field of the configuration
            differs.
    """
    first, second = (CheckpointFolder.open(folder).config for folder in (reference, candidate))
    families = [models.family_of(config).name for config in (first, second)]
    if families[0] != families[1]:
        raise UserError(
            f"{reference} is a {families[0]} model and {candidate} a {families[1]} model",
            remedy="compare a model with its own quantized version",
        )
    first, second = (models.parse_config(config).to_dict() for config in (first, second))
    if different := [name for name in first if first[name] != second[name]]:
        name = different[0]
        raise UserError(
            f"{reference} and {candidate} are different models: {name} is {first[name]} and {second[name]}",
            remedy="compare a model with its own quantized version",
            items=different,
        )
