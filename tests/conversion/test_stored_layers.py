"""Layers read back from a folder: weights whose parts have scales of their own, and inputs that other formats lack."""

import numpy as np
import pytest
from small_models import unet

import models
import qvdjax
from conversion.compressed_tensors import refuse_transforms
from conversion.stored_layers import StoredLayer, stored_layers
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme, QuantizedConv, layers_of
from qvdjax.numerics import Quantizer
from qvdjax.recipes import get

ONE_LEVEL = {"block_out_channels": [16], "down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"]}


@pytest.mark.parametrize("symmetric", [True, False])
def test_parts_of_a_weight_are_decoded_by_their_own_scales(tmp_path, symmetric):
    recipe = get(
        "rtn-w4a8", split_inputs=True, weight_symmetric=symmetric, skip=r"(?!up_blocks\.0\.resnets\.1\.conv1).*"
    )
    model = qvdjax.quantize(unet(**ONE_LEVEL), recipe)
    models.save(model, tmp_path / "out")
    [(name, stored)] = stored_layers(CheckpointFolder.open(tmp_path / "out")).items()
    [(_, _, layer)] = layers_of(model, (QuantizedConv,))
    assert stored.scheme.split == (16, 16)
    weight = stored.weight()
    assert weight.shape == (16, 32, 3, 3)
    # The same codes by the same float32 scales.
    np.testing.assert_allclose(weight.reshape(16, -1), layer.qweight.dequantize(), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("several", [
    Quantizer(8, granularity="frame", frames=3), Quantizer(8, granularity="step", timesteps=(1.0, 9.0)),
])  # fmt: skip
def test_several_static_ranges_have_no_form_in_compressed_tensors(several):
    layer = StoredLayer(None, "block.to_q", LayerScheme(Quantizer(8), several), (4, 4), convolution=False)
    with pytest.raises(UserError, match="several static ranges") as refused:
        refuse_transforms([layer])
    assert several.granularity in refused.value.items[0]
