"""A pipeline with a transformer of Wan-14B's widths and several shards: what converting it takes in memory.

Seven blocks instead of forty, 5.4 GB in bfloat16 instead of 28.6: whoever held all of it would be seen, and more blocks
are more of the same.
"""

import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from measured import run

import models
from qvdjax.checkpoint import CheckpointFolder, TensorSource, expected_tensors
from qvdjax.checkpoint.folder import writing_order

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"),
]

WAN_14B = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "num_layers": 7, "ffn_dim": 13824}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

CONVERT = """
import conversion
source, target = sys.argv[1:]
conversion.convert(source, target, dry_run=True)
with measured():
    conversion.convert(source, target)
"""


def holes(folder: Path, config: dict, shard_bytes: int) -> dict[str, int]:
    """A model folder in shards that are holes, zeros which take no place on the disk. Returns bytes by tensor."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    expected = expected_tensors(models.abstract(config))
    tensors = [TensorSource(key, tensor.shape, BFLOAT16, None) for key, tensor in expected.items()]
    where, shards = {}, writing_order(tensors, shard_bytes)
    for number, shard in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        header, offset = {}, 0
        for tensor in shard:
            stop = offset + tensor.nbytes
            header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, stop]}
            where[tensor.name], offset = name, stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return {tensor.name: math.prod(tensor.shape) * BFLOAT16.itemsize for tensor in tensors}


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    sizes = holes(tmp_path / "pipeline" / "transformer", WAN_14B, 10**9)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    report = run(CONVERT, tmp_path / "pipeline", tmp_path / "target")
    folder = CheckpointFolder.open(tmp_path / "target" / "transformer")
    files = {file.path for file in folder.files.values()}
    shutil.rmtree(tmp_path / "target")  # gigabytes, which pytest would keep
    assert folder.nbytes == sum(sizes.values()) > 5e9
    assert len(files) == 2
    assert report["peak"] <= 4e9
    # The mapped pages of the file and the array, or when it is read back the same; masks and the writer's buffers are
    # far below another.
    assert report["growth"] <= 3 * max(sizes.values())
