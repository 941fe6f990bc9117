"""Model folders of safetensors, read and written strictly, one tensor at a time, and atomically."""

from qvdjax.checkpoint.atomic import new_folder
from qvdjax.checkpoint.fingerprint import fingerprint
from qvdjax.checkpoint.folder import CheckpointFolder, Progress, read_json, write_folder
from qvdjax.checkpoint.loading import load_variables, loaded_shapes, save_variables
from qvdjax.checkpoint.safetensors_file import (
    SafetensorsFile,
    TensorSource,
    all_finite,
    cast_checked,
    floating_dtype,
    is_floating,
    write_file,
)
from qvdjax.checkpoint.variables import Expected, check_tensors, expected_tensors, stored_variables

__all__ = [
    "CheckpointFolder", "Expected", "Progress", "SafetensorsFile", "TensorSource", "all_finite", "cast_checked",
    "check_tensors", "expected_tensors", "fingerprint", "floating_dtype", "is_floating", "load_variables",
    "loaded_shapes", "new_folder", "read_json", "save_variables", "stored_variables", "write_file", "write_folder",
]  # fmt: skip
