"""q-vdit-*: a learned estimate of what rounding takes off a product, frame by frame, and a loss between frames."""

import dataclasses

from qvdjax.calibration.selection import Selection
from qvdjax.nn import TokenEstimator
from qvdjax.ptq.reconstruction import Reconstruction, TokenEstimation
from qvdjax.ptq.transforms import FitChannelScale
from qvdjax.recipes.method import FLOAT_ACTIVATION_BITS, Method
from qvdjax.recipes.rules import Recipe, Rule


@dataclasses.dataclass(frozen=True)
class QVDiT(Method):
    """rtn with a trained rank-one estimate beside each product and trained steps of the weights' grids (Feng et al.,
    ICML 2025, arXiv 2505.22167).

    Token-aware quantization estimator: y = Q(x) Q(W)^T + g_frame (Q(x) . alpha) beta, with a vector alpha of inputs, a
    vector beta of outputs that starts at zero, and a gain g for each frame. Temporal maintenance distillation: beside
    the squared error, `temporal` times the divergence between the softmaxes of the frames' cosines, of the float output
    and of the rounded one. What is learned stands in the folder, is computed in every execution, and costs in + out
    multiply-adds a token.

    Paper and release (wlfeng0509/Q-VDiT, Open-Sora only) differ, and neither is followed in all. Blocks are trained one
    after the other towards their full-precision output, on inputs that come through the quantized blocks before
    (`scope=block`), so that memory is one block's; the release trains the network as a whole, which `scope=model` does,
    towards the stream behind the last block where the release takes the prediction. The loss between frames is one of
    that stream, the squared error relative to what the blocks change of it. Frames are the video's tokens, frame by
    frame, where the release reshapes channels and frames together. Inputs are rounded in training, as the estimate is
    of rounded ones; the release leaves them float. The release's further branch of rank 32 inside the weight's
    quantizer, of which the paper says nothing, is left out. Gains start by the paper's formula (`gains=ones`: the
    release) in all layers that see the video's tokens; layers that see only text have none. 1,000 steps a block at ten
    times the release's rates of 1e-5 and, for steps of about 0.01, 1e-6, where it takes 5,000 to 15,000. Videos are
    sampled with as many frames as the calibration's.
    Command: `qvdjax quantize DIR OUT --recipe q-vdit-w4a6 --calibration CALIBRATION`.
    Expected: better than rtn at 4 bits of weights and below; where inputs have heavy channels, little without `alpha`.
    Published, VBench imaging quality and scene consistency of Open-Sora at W4A6: 57.49, 38.66 against 63.68, 39.61 in
    full precision, with feed-forward layers at 8 bits in the release (`feed_forward_bits=8`).

    Attributes:
        samples: Steps that are trained on, each with the prompt and with the negative prompt.
        iterations: Steps of a block's training, rounded up to whole passes over the samples.
        batch: Model inputs in a step.
        rate: AdamW's, of estimates. step_rate: Of the logarithms of the weights' steps. Both fall to 0 by a cosine.
        temporal: gamma (0 in the release's configuration for W4A6).
        gains: "formula", "ones", or "none" for an estimate without gains.
        rank: Of the estimate.
        alpha: Of SmoothQuant's scale before all; none for no scale, as in the release at W4A6 (0.11 at W3A8 and W4A8,
            0.5 at W6A6).
        feed_forward_bits: Of weights and inputs of feed-forward layers; none for the recipe's.
        scope: What is trained at a time, each "block" or the "model".
        inputs: "propagated" through the quantized blocks before, or "full_precision".
        seed: Of alpha and of the samples.
    """

    weight_symmetric: bool = False
    activation_symmetric: bool = False
    weight_range: str = "search"
    samples: int = 40
    iterations: int = 1000
    batch: int = 1
    rate: float = 1e-4
    step_rate: float = 1e-3
    temporal: float = 100.0
    gains: str = "formula"
    rank: int = 1
    alpha: float | None = None
    feed_forward_bits: int | None = None
    scope: str = "block"
    inputs: str = "propagated"
    seed: int = 0

    name = "q-vdit"

    def transform(self) -> FitChannelScale | None:
        """The channel scale, where there is one."""
        return None if self.alpha is None else FitChannelScale(self.alpha)

    def estimator(self) -> TokenEstimator:
        """The estimate; which layers have gains follows from the model."""
        return TokenEstimator(self.rank)

    def reconstruction(self) -> Reconstruction:
        """The training of estimates and steps."""
        estimation = TokenEstimation("ones" if self.gains == "none" else self.gains, self.gains != "none", self.seed)
        return Reconstruction(
            iterations=self.iterations, batch=self.batch, rate=self.rate, clip_rate=self.step_rate, final_rate=0.0,
            unit="change", scope=self.scope, estimation=estimation, temporal=self.temporal, inputs=self.inputs,
            token_weights=None, selection=Selection(self.samples, "random", seed=self.seed),
        )  # fmt: skip

    def recipe(self) -> Recipe:
        """The rules, with feed-forward layers at bits of their own where asked for."""
        recipe = super().recipe()
        if self.feed_forward_bits is None:
            return recipe
        bits = self.feed_forward_bits
        inputs = FLOAT_ACTIVATION_BITS if self.activation_bits == FLOAT_ACTIVATION_BITS else bits
        wide = dataclasses.replace(self, weight_bits=bits, activation_bits=inputs, feed_forward_bits=None).recipe()
        roles = ("feed_forward_in", "feed_forward_out")
        scheme = next(rule.scheme for rule in wide.rules if set(roles) <= set(rule.roles))
        number = next(i for i, rule in enumerate(recipe.rules) if set(roles) <= set(rule.roles))
        rules = (*recipe.rules[:number], Rule(scheme, roles), *recipe.rules[number:])
        return dataclasses.replace(recipe, rules=rules)
