"""qvd-*: quantization of video UNets that keeps timesteps apart and brings channels' ranges together."""

import dataclasses

from qvdjax.nn import LayerScheme
from qvdjax.numerics import Quantizer
from qvdjax.ptq.range_search import RangeSearch
from qvdjax.ptq.transforms import FitChannelScale, FitShift, SearchScale
from qvdjax.recipes.learned_rounding import LearnedRounding
from qvdjax.recipes.minmax import MinMax
from qvdjax.recipes.rules import Recipe, Rule


@dataclasses.dataclass(frozen=True)
class QVD(LearnedRounding, MinMax):
    """Static ranges by search, behind a shift of each channel; temporal features on a grid that keeps them apart.

    Source: arXiv 2407.11585 (ACM MM 2024): HTDQ for temporal features, SCRI for the ranges of channels. The paper's
    text was not at hand; what is here was read in the port of the authors' code (PaddleSlim `example/QVD`), which has
    holes, and where that is silent, chosen and named below. Published: FVD 442 at W8A8 in that port's README, and 205
    less than existing methods at W8A8 in the abstract; model and set are not stated with either.
    Command: `qvdjax quantize DIR OUT --recipe qvd-w8a8 --calibration CALIBRATION`.
    Expected: near the full-precision model at W8A8, and ahead of `minmax` below.

    HTDQ: the input of every `time_emb_proj` is rounded to one of several grids, chosen by how well timesteps can still
    be told apart (`qvdjax.ptq.feature_grids`); fitted to the timesteps of the calibration set, which are all there are.
    `temporal_features=log2` is the released quantizer. SCRI: the middle of each channel's range over the first sampling
    step is subtracted before rounding, and what that takes off the product is in the bias, also at zero-padded borders.
    The release has no call of it left, so all layers with tokens or positions have one; query, key and value, which see
    one input, share it by construction. Its optional second part, a scale, is off in the release.

    Left open by the sources: the score by which HTDQ chooses; which layers are shifted. The first and the last
    convolution stay float as in every recipe here, and so do the layers that make the time embedding; `qvd-paper` has
    the release's choice. Weights are rounded to the nearest code, as the release does unless told otherwise;
    `learn=true` learns their rounding block by block as `adaround` does (the release: QDrop, with a share of inputs
    left float, 100 steps).

    Attributes:
        statistics: "first" takes the ranges of channels from the first sampling step, as released; "all" from all;
            "step" has a shift for each timestep of the calibration set, and what it takes off a product in a table over
            these (the first step's drifts from what later steps have).
        static_range: How the static range follows from the shifted input: "magnitude", "shrink" or "minmax"
            (`qvdjax.ptq.range_search`).
        frame_ranges: Layers of a UNet that see each frame on its own have a range for each frame, the same in all
            samples, narrowed by one factor (with `static_range=minmax` by none); the model then takes videos of as many
            frames as were calibrated. As released; off here, where all recipes have one range a layer. Layers that mix
            frames, and models that have all frames in one sequence, keep one range.
        step_ranges: Every input has a range for each timestep of the calibration set instead, as `tfmq-dm` has it.
        over_calls: "mean": ranges are means over the calls of the calibration set, as released, which clips the calls
            whose inputs are larger than on average. "widest" clips none of them.
        shift: False leaves SCRI out.
        scale_alpha: After the shift each channel is divided by SmoothQuant's scale of this alpha; none for no scale.
        scale_search: Instead, channels wider than a threshold are divided down to it (Outlier Suppression+); the
            threshold is searched for, layer by layer (`qvdjax.ptq.transforms.SearchScale`). In the release, switched
            off. Each threshold takes a product of every layer over the steps of `statistics`.
        thresholds: How many are tried.
        ends_bits: Bits of the first and last layers (roles embedder and head): of both weights and of the first input;
            the last input stays float. None keeps them float; the release has 8 whatever the other layers have.
        quantize_time: Quantize the layers that make the time embedding as any other, as the release does.
        temporal_features: See `Method`; "auto" is HTDQ.
        learn: Learn the rounding of weights (see `adaround`).
    """

    weight_range: str = "minmax"
    learn: bool = False
    activation_symmetric: bool = False
    temporal_features: str = "auto"
    statistics: str = "first"
    static_range: str = "magnitude"
    frame_ranges: bool = False
    step_ranges: bool = False
    over_calls: str = "mean"
    shift: bool = True
    scale_alpha: float | None = None
    scale_search: bool = False
    thresholds: int = 100
    ends_bits: int | None = None
    quantize_time: bool = False

    name = "qvd"
    transforms_convolutions = True

    def __post_init__(self):
        super().__post_init__()
        if self.statistics not in ("first", "all", "step"):
            raise ValueError(f"unknown statistics {self.statistics!r}: use first, all or step")
        if self.statistics == "step" and (self.scale_search or not self.shift):
            raise ValueError("statistics of steps are of shifts, behind which no scale is searched for")
        if self.frame_ranges and self.step_ranges:
            raise ValueError("ranges are of frames or of timesteps: give frame_ranges or step_ranges")
        if (self.scale_alpha is not None or self.scale_search) and not self.shift:
            raise ValueError("the scale comes behind the shift: leave it out, or take `smoothquant`")
        if self.scale_alpha is not None and self.scale_search:
            raise ValueError("there is one scale: give scale_alpha or scale_search")
        if self.average_bits is not None:
            raise ValueError("what a shifted input does to a rounded weight is not measured: leave average_bits out")

    def activation(self) -> Quantizer | None:
        """Static, one range a tensor, or a frame, or a timestep."""
        tensor = super().activation()
        granularity = "frame" if self.frame_ranges else "step" if self.step_ranges else None
        return dataclasses.replace(tensor, granularity=granularity) if tensor and granularity else tensor

    def transform(self) -> FitShift | None:
        """The shift."""
        if not self.shift:
            return None
        if self.scale_search:
            return FitShift(SearchScale(self.thresholds))
        return FitShift(None if self.scale_alpha is None else FitChannelScale(self.scale_alpha))

    def range_search(self) -> RangeSearch:
        """How static ranges are found."""
        return RangeSearch(self.static_range, over_calls=self.over_calls)

    def channel_statistics(self) -> str:
        """Over which steps the ranges of channels are taken."""
        return self.statistics

    def recipe(self) -> Recipe:
        """The common rules, and before them those of layers that otherwise stay float."""
        plain, own = super().recipe(), []
        weight = dataclasses.replace(self.weight(), granularity="channel", group_size=None, codebook=None)
        inputs = self.activation()
        if self.ends_bits is not None:
            wide, wide_inputs = (q and dataclasses.replace(q, bits=self.ends_bits) for q in (weight, inputs))
            first = "the first layers have bits of their own: few weights that everything after depends on"
            last = "the last layer has bits of its own, and a float input: its error is the prediction's"
            own += [
                Rule(LayerScheme(wide, wide_inputs, reason=first), roles=("embedder",)),
                Rule(LayerScheme(wide, reason=last), roles=("head",)),
            ]
        if self.quantize_time:
            reason = "the option `quantize_time` treats it as any other"
            own.append(Rule(LayerScheme(weight, inputs, reason=reason), roles=("time",)))
        skipped = tuple(rule for rule in plain.rules if rule.path)
        return dataclasses.replace(plain, rules=(*skipped, *own, *plain.rules[len(skipped) :]))


@dataclasses.dataclass(frozen=True)
class QVDPaper(QVD):
    """QVD with the layers and grids of its source, as far as the port of the authors' code shows them.

    Against `qvd`: a range for each frame, eight bits in the first and the last convolution (whose input is float), the
    layers of the time embedding quantized as any other, asymmetric weights, and temporal features on the released grid
    of powers of two. As there the scale behind the shift is left out.
    Command: `qvdjax quantize DIR OUT --recipe qvd-paper-w8a8 --calibration CALIBRATION`. Published: see `qvd`.
    """

    weight_symmetric: bool = False
    temporal_features: str = "log2"
    frame_ranges: bool = True
    ends_bits: int | None = 8
    quantize_time: bool = True

    name = "qvd-paper"
