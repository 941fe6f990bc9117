"""Parity of a video UNet with diffusers' of the same name: folders both ways, and predictions in float64."""

import tempfile

from parity import parity_errors

PROGRAM = """
import json, sys
from pathlib import Path
import diffusers, jax, jax.numpy as jnp, numpy as np, torch
import models

@torch.no_grad()
def apply(reference, inputs):
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    latents, given = tensors["latents"], {}
    frames_first = isinstance(reference, diffusers.UNetSpatioTemporalConditionModel)
    if frames_first:
        image = tensors["image_latents"].expand(-1, latents.shape[1], -1, -1, -1)
        latents, given["added_time_ids"] = torch.cat([latents, image], dim=-1), tensors["added_time_ids"]
    latents = latents.permute(0, 1, 4, 2, 3) if frames_first else latents.permute(0, 4, 1, 2, 3)
    out = reference(latents, tensors["timestep"], tensors["context"], **given).sample
    return (out.permute(0, 1, 3, 4, 2) if frames_first else out.permute(0, 2, 3, 4, 1)).numpy()

def error(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

run = jax.jit(lambda model, inputs: model(**inputs))
torch.manual_seed(0)
random, errors = np.random.default_rng(0), {}
for name, case in json.loads(sys.argv[1]).items():
    config, (frames, height, width) = case["config"], case["size"]
    folder, kind = Path(sys.argv[2], name), getattr(diffusers, config["_class_name"])
    reference = kind(**{k: v for k, v in config.items() if not k.startswith("_")}).double().eval()
    with torch.no_grad():
        for tensor in reference.parameters():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 0
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * (1.5 / fan_in**0.5 if fan_in else 0.5))
    reference.save_pretrained(folder / "theirs")
    model = models.load(folder / "theirs")
    models.save(model, folder / "ours")
    back = kind.from_pretrained(folder / "ours", torch_dtype=torch.float64).eval()
    weights = back.state_dict()
    assert weights.keys() == reference.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in reference.state_dict().items())

    shapes = {
        "latents": (frames, height, width, config["out_channels"]),
        "context": (case["tokens"], config["cross_attention_dim"]), **case["conditions"],
    }
    inputs = {key: random.standard_normal((2, *shape)) for key, shape in shapes.items()}
    for time, values in {"zero": {"timestep": [0.0, 0.0], **case["zero"]}, "ordinary": case["ordinary"]}.items():
        inputs = {**inputs, **{key: np.asarray(value) for key, value in values.items()}}
        theirs, ours = apply(reference, inputs), run(model, {key: jnp.asarray(a) for key, a in inputs.items()})
        assert ours.dtype == jnp.float64
        errors[f"{name}: {time}"] = error(np.asarray(ours), theirs)
    errors[f"{name}: saved by us"] = error(apply(back, inputs), theirs)
print(json.dumps(errors))
"""


def unet_errors(cases: dict[str, dict]) -> dict[str, float]:
    """Relative L2 errors "<case>: zero", "<case>: ordinary" and "<case>: saved by us".

    Folders are compared on the way: every weight survives diffusers -> ours -> diffusers bit for bit.

    Args:
        cases: By name: `config`; `size`, (frames, height, width) of the latents; `tokens` of the context; `conditions`,
            shapes of one video's further inputs; `zero` and `ordinary`, values of inputs for two calls.
    """
    with tempfile.TemporaryDirectory() as folder:
        return parity_errors(PROGRAM, cases, folder)
