"""Wan-1.3B at its real size, with random weights: what converting, quantizing and loading take in bytes and memory."""

import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from measured import run

import models
from conversion import wan_original
from qvdjax.checkpoint import CheckpointFolder, TensorSource, expected_tensors, write_folder
from qvdjax.nn import QUANTIZED_LAYERS, layers_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"),
]

WAN_1_3B = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MOST_OF_BFLOAT16 = {"rtn-w4a8": 0.28, "rtn-w8a8": 0.52}

CONVERT = """
import conversion
source, target = sys.argv[1:]
conversion.convert(source, target, dry_run=True)  # traces the model and reads the header: all but the weights
with measured():
    conversion.convert(source, target)
"""

QUANTIZE = """
import models
from qvdjax import quantize
source, *targets = sys.argv[1:]
with measured():
    model = models.load(source)
    for recipe, target in zip(targets[::2], targets[1::2]):
        models.save(quantize(model, recipe), target)
"""

LOAD = """
import jax, models
from flax import nnx
models.skeleton(sys.argv[1])
with measured() as report:
    model = models.load(sys.argv[1])
    arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
"""


@pytest.fixture(scope="module")
def weights():
    """diffusers key -> random bfloat16 weights; all are windows of one random buffer, each at a place of its own."""
    shapes = {key: tensor.shape for key, tensor in expected_tensors(models.abstract(WAN_1_3B)).items()}
    size = max(map(math.prod, shapes.values())) + 7 * len(shapes)
    buffer = (0.02 * np.random.default_rng(0).standard_normal(size, np.float32)).astype(BFLOAT16)
    return {
        key: buffer[7 * i : 7 * i + math.prod(shape)].reshape(shape) for i, (key, shape) in enumerate(shapes.items())
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder that is emptied afterwards: pytest itself would keep gigabytes for three more runs."""
    path = tmp_path_factory.mktemp("real_size")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def converted(work, weights):
    """(report of the conversion, its folder), from a file as Wan publishes it."""
    sources = [
        TensorSource(wan_original.to_original(key), value.shape, BFLOAT16, lambda value=value: value)
        for key, value in weights.items()
    ]
    config = wan_original.original_config(models.parse_config(WAN_1_3B).to_dict())
    write_folder(work / "original", config, sources)
    report = run(CONVERT, work / "original", work / "diffusers")
    shutil.rmtree(work / "original")
    return report, work / "diffusers"


@pytest.fixture(scope="module")
def quantized(work, converted):
    """Recipe -> folder."""
    folders = {recipe: work / recipe for recipe in MOST_OF_BFLOAT16}
    run(QUANTIZE, converted[1], *(part for pair in folders.items() for part in pair))
    return folders


def test_converting_needs_memory_for_its_largest_tensor_only(converted, weights):
    report, folder = converted
    folder, largest = CheckpointFolder.open(folder), max(value.nbytes for value in weights.values())
    assert folder.nbytes == sum(value.nbytes for value in weights.values()) > 2.8e9
    # One tensor at a time: the mapped pages of the file it is read from and the array itself, 2; the masks that look
    # for NaN in 4 million numbers at a time, 20 MB, less than 1. It is written from the array.
    assert report["growth"] <= 3 * largest
    for key, value in weights.items():
        assert folder.read(key).tobytes() == value.tobytes(), key


@pytest.mark.parametrize("recipe", MOST_OF_BFLOAT16)
def test_quantized_layers_take_their_bits_on_disk(quantized, weights, recipe):
    folder = CheckpointFolder.open(quantized[recipe])
    sizes = {}
    for key in folder.keys:
        layer = key.removesuffix(".transform.smooth_scale").rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + folder.info(key).nbytes
    names = [name for names, _, _ in layers_of(models.skeleton(folder.path), QUANTIZED_LAYERS) for name in names]
    assert len(names) == 30 * 10 + 1  # the products of every block, and the projection of the timestep
    ratios = []
    for name in names:
        before = sum(weights[f"{name}.{part}"].nbytes for part in ("weight", "bias"))
        ratios.append(sizes[name] / before)  # codes, scales, bias, signal-to-noise ratio
    # Each on its own, so their sum too. Codes are 1/4 or 1/2; a float32 scale a row of 1536 is 0.0013 more.
    assert max(ratios) <= MOST_OF_BFLOAT16[recipe]
    assert min(ratios) >= {"rtn-w4a8": 0.25, "rtn-w8a8": 0.5}[recipe]


def test_quantized_weights_are_those_of_the_source(quantized, weights):
    folder = CheckpointFolder.open(quantized["rtn-w8a8"])
    for name in ("blocks.0.attn1.to_q", "blocks.29.ffn.net.2", "condition_embedder.time_proj"):
        codes, scale = folder.read(f"{name}.weight"), folder.read(f"{name}.weight_scale")
        error = np.abs(codes * scale - weights[f"{name}.weight"].astype(np.float32)) / scale
        assert error.max() <= 0.5001  # half a step, and the rounding of float32


@pytest.mark.parametrize("recipe", MOST_OF_BFLOAT16)
def test_loading_needs_little_more_memory_than_the_quantized_model(quantized, recipe):
    folder = CheckpointFolder.open(quantized[recipe])
    largest = max(folder.info(key).nbytes for key in folder.keys)
    report = run(LOAD, quantized[recipe])
    # A quantized model must not pass through its full-precision size. 1.3 leaves room for one stack that is being
    # filled and for the allocator.
    assert report["growth"] <= 1.3 * folder.nbytes + largest
    assert report["growth"] >= 0.9 * folder.nbytes  # it was measured at all
