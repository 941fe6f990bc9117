"""What all methods share: their bits, their options, and the exceptions that every preset makes."""

import dataclasses
from typing import Final

from qvdjax.nn import AttentionScheme, Centering, InputClip, LayerScheme, LowRank, TimestepIntervals, TokenEstimator
from qvdjax.numerics import FeatureGrid, Quantizer
from qvdjax.numerics.codebook import MOST_BITS
from qvdjax.numerics.float8 import FLOAT8
from qvdjax.ptq.bit_switch import SwitchBits
from qvdjax.ptq.channel_bits import ChannelBits
from qvdjax.ptq.feature_grids import ChooseGrid
from qvdjax.ptq.mixed_precision import MixedPrecision
from qvdjax.ptq.range_search import RangeSearch
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.timestep_scales import TimestepScales
from qvdjax.recipes.rules import Recipe, Rule
from qvdjax.recipes.training import Training

PRODUCTS = ("query", "key", "value", "attention_output", "feed_forward_in", "feed_forward_out", "projection")
FLOAT_ACTIVATION_BITS = 16
PRESET_BITS = ((8, 8), (6, 6), (4, 8), (4, 6), (4, 4), (3, 3))  # of weights and activations
CHOSEN: Final = {"auto": "collapse", "signal": "signal"}  # temporal_features -> score that a grid is chosen by
_OF_THE_WHOLE = ("frame", "step")  # granularities that leave no axis of a product with ranges of its own
_ONE_VECTOR = "weights only: its input is one vector a step"


@dataclasses.dataclass(frozen=True)
class Method:
    """A method and its options; `recipe` composes them. Options may be overridden by `--set key=value`.

    Every preset makes the same exceptions, each with its reason in the table of layers:
      * embedders (patches, text, the MLP of the timestep) stay float;
      * the output projection stays float;
      * modulation and time-projection layers keep weights at the recipe's bits and float inputs: they see one vector a
        step, so they cost no time, yet hold 14 to 26 % of some models' weights.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 2 to 8, or 16 for float activations.
        weight_symmetric, activation_symmetric: No zero point.
        group_size: Input channels that share a weight range; None for one range an output channel.
        activation_group_size: Channels of a token that share a range of the input; None for one range a token. Groups
            are multiplied one after the other, each with scales of its own.
        weight_range: "minmax", "search" for the range of least error, or "refine" for scale and zero point of least
            squared error.
        attention_qk_bits, attention_pv_bits: Bits of the products of attention; None leaves them float, as
            the papers do.
        attention_key_block: Neighbouring keys that share a range; None for a range each.
        attention_codebook: "float8_e4m3fn" for float8 in the place of integers there, of 8 bits.
        skip: Regular expression of further paths that stay float; empty for none.
        codebook: "gaussian" for the levels of least error for a normal distribution in the place of even grids, up to 7
            bits (`qvdjax.numerics.codebook`); for rotated inputs and weights, which are nearly normal. "float8_e4m3fn"
            for floating-point numbers of 8 bits (`qvdjax.numerics.float8`); convolutions then stay float.
        temporal_features: How the inputs of layers that add the timestep to a UNet's blocks are rounded, at
            `activation_bits`: "float" not at all; "symmetric", "asymmetric", "log2", "log" or "mixed" on one grid for
            all timesteps (`qvdjax.numerics.FeatureGrid`); "auto" on the one of these that tells timesteps apart best
            (QVD's HTDQ), "signal" on the one behind whose layer most is left of what changes with the timestep; "step"
            with a range for each timestep, a table over steps as TFMQ-DM has it.
        average_bits: Bits a weight on average, shared out among layers by what rounding each does to the prediction
            (`qvdjax.ptq.mixed_precision`), in the place of one number for all. Blocks whose layers differ are compiled
            one by one.
        split_inputs: Convolutions that read a UNet's skip connection beside the sample have ranges of their own for
            both, of the input and of the weight (Q-Diffusion, arXiv 2302.04304, section 4.2).
        centered: What the tokens of a sample have in common is taken off the inputs of products before they are
            rounded, and multiplied by itself at 8 bits (`qvdjax.nn.Centering`); of inputs with dynamic ranges.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    weight_symmetric: bool = True
    activation_symmetric: bool = True
    group_size: int | None = None
    activation_group_size: int | None = None
    weight_range: str = "minmax"
    attention_qk_bits: int | None = None
    attention_pv_bits: int | None = None
    attention_key_block: int | None = None
    attention_codebook: str | None = None
    skip: str = ""
    codebook: str | None = None
    temporal_features: str = "float"
    average_bits: float | None = None
    split_inputs: bool = False
    centered: bool = False

    name = ""  # of the method, as recipes spell it
    preset_bits = PRESET_BITS  # those that are listed
    transformed = PRODUCTS  # roles whose inputs pass through `transform`
    transforms_convolutions = False  # whether the inputs of convolutions pass through `transform` too
    calibrates_on_all = False  # whether all but reconstruction sees the whole calibration set (see `Recipe`)

    @property
    def recipe_name(self) -> str:
        """`<method>-w<bits>a<bits>`."""
        return f"{self.name}-w{self.weight_bits}a{self.activation_bits}"

    def weight(self) -> Quantizer:
        """The quantizer of weights."""
        granularity = "channel" if self.group_size is None else "group"
        return Quantizer(
            self.weight_bits, self.weight_symmetric, granularity, self.group_size, range_method=self.weight_range,
            codebook=self._codebook_of(self.weight_bits),
        )  # fmt: skip

    def activation(self) -> Quantizer | None:
        """The quantizer of the inputs of products: dynamic, one range a token or a group of its channels."""
        if self.activation_bits == FLOAT_ACTIVATION_BITS:
            return None
        granularity = "token" if self.activation_group_size is None else "group"
        bits, symmetric, size = self.activation_bits, self.activation_symmetric, self.activation_group_size
        return Quantizer(bits, symmetric, granularity, size, dynamic=True, codebook=self._codebook_of(bits))

    def _codebook_of(self, bits: int) -> str | None:
        """int8 has no finer levels to choose from for codes of 8 bits, and float8 has no others."""
        if self._floating and bits != 8:
            raise ValueError(f"{FLOAT8} has 8 bits, not {bits}")
        return self.codebook if self._floating or bits <= MOST_BITS else None

    @property
    def _floating(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.codebook == FLOAT8

    def transform(self):
        """What fits the transform of a product's input; None for none."""
        return

    def range_search(self) -> RangeSearch | TimestepScales | None:
        """How static ranges of inputs are searched for or learned; None where they follow from ranges of channels."""
        return

    def channel_bits(self) -> ChannelBits | None:
        """How bits are shared out among the output channels of a weight; None for all alike."""
        return

    def channel_statistics(self) -> str:
        """How the ranges of channels are taken over sampling steps: "all", "first", "salience" or "magnitude" (see
        `Recipe`)."""
        return "all"

    def rounding(self):
        """How the weights of linear layers are rounded (`qvdjax.ptq.gptq`); None for the nearest code."""
        return

    def reconstruction(self) -> Reconstruction | None:
        """How blocks are reconstructed (`qvdjax.ptq.reconstruction`); None for not at all."""
        return

    def input_clip(self) -> InputClip | None:
        """How the dynamic input ranges of products are narrowed; None for not at all."""
        return

    def low_rank(self) -> LowRank | None:
        """The branch in full precision beside every product; None for none."""
        return

    def estimator(self) -> TokenEstimator | None:
        """The learned estimate that is added to every product; None for none."""
        return

    def intervals(self) -> TimestepIntervals | None:
        """The intervals of timesteps in each of which products are quantized on their own; None for none."""
        return

    def switched_bits(self) -> SwitchBits | None:
        """How the steps are chosen at which inputs get more bits; None for none."""
        return

    def _centering(self, activation: Quantizer | None) -> Centering | None:
        """How the inputs of products are centred; there is nothing to centre in an input that stays float."""
        return Centering() if self.centered and activation is not None else None

    def _temporal_feature(self, weight: Quantizer) -> tuple[LayerScheme, ChooseGrid | None]:
        """What becomes of layers that add the timestep to a UNet's blocks, and among which grids that is chosen."""
        kind, bits = self.temporal_features, self.activation_bits
        if kind == "float" or bits == FLOAT_ACTIVATION_BITS:
            return LayerScheme(weight, reason=_ONE_VECTOR), None
        if kind == "step":
            quantizer = Quantizer(bits, symmetric=False, granularity="token", dynamic=True)
            return LayerScheme(weight, quantizer, reason="its input, one vector a step, has a range of its own"), None
        reason = "its input, one vector a step, tells blocks the timestep"
        if kind in CHOSEN:
            return LayerScheme(weight, reason=reason), ChooseGrid.among_all(bits, CHOSEN[kind])
        return LayerScheme(weight, reason=reason), ChooseGrid((FeatureGrid(kind, bits),))

    def training(self) -> Training | None:
        """How `qvdjax train` makes this recipe's models; None for the straight-through estimator towards a teacher."""
        return

    def recipe(self) -> Recipe:
        """The rules in order; the first that matches a layer decides."""
        weight, activation, transform = self.weight(), self.activation(), self.transform()
        transforms, rotation, kronecker = (), None, None
        if transform is not None:
            transforms, rotation, kronecker = transform.names, transform.rotation, transform.kronecker
        # Levels of a normal distribution are for rotated inputs and weights alone.
        plain = weight if self._floating else dataclasses.replace(weight, codebook=None)
        tensor = None
        if activation is not None:
            whole = activation.granularity if activation.granularity in _OF_THE_WHOLE else "tensor"
            tensor = dataclasses.replace(activation, granularity=whole, group_size=None, codebook=None)
        channel = dataclasses.replace(plain, granularity="channel", group_size=None)
        feature, grids = self._temporal_feature(plain)
        intervals, reason = self.intervals(), "a product over all tokens"
        if self._floating:
            reason += f"; codes are {FLOAT8}"
        if intervals is not None:
            reason += f"; codes for each of {len(intervals)} intervals of timesteps"
        product = LayerScheme(weight, activation, transforms, reason, self.input_clip(), rotation,
                              self.low_rank(), kronecker, estimator=self.estimator(),
                              centering=self._centering(activation), timestep_intervals=intervals)  # fmt: skip
        untransformed = tuple(role for role in PRODUCTS if role not in self.transformed)
        rules = []
        if self.skip:
            rules.append(Rule(LayerScheme(reason="the option `skip` keeps it float"), path=self.skip))
        rules += [
            Rule(LayerScheme(reason="embedders stay float: few weights that everything after depends on"),
                 roles=("embedder", "time")),
            Rule(LayerScheme(reason="the output projection stays float: its error is the prediction's"),
                 roles=("head",)),
            Rule(LayerScheme(plain, reason=_ONE_VECTOR), roles=("modulation",)),
            Rule(feature, roles=("temporal_feature",)),
            *([Rule(product, roles=self.transformed)] if self.transformed else []),
            Rule(LayerScheme(reason=f"no convolution of {FLOAT8} is here") if self._floating else
                 LayerScheme(channel, tensor, transforms if self.transforms_convolutions else (),
                             "a product over all positions: one range for the input"),
                 roles=("convolution",)),
        ]  # fmt: skip
        if untransformed:
            bare = dataclasses.replace(product, transforms=(), rotation=None, kronecker=None)
            rules.append(Rule(bare, roles=untransformed))
        if self.attention_qk_bits or self.attention_pv_bits:
            products = AttentionScheme(
                self.attention_qk_bits, self.attention_pv_bits, reason="the option attention_*_bits",
                key_block=self.attention_key_block, codebook=self.attention_codebook,
            )  # fmt: skip
            rules.append(Rule(products, roles=("attention",)))
        mixed = None if self.average_bits is None else MixedPrecision(self.average_bits)
        if mixed is not None and self.training() is not None:
            raise ValueError("the bits of a trained method are one number: average_bits is for methods that calibrate")
        if self.codebook is not None and self.training() is not None:
            raise ValueError("the grids of a trained method are even: leave codebook out")
        if mixed is not None and self.codebook is not None and max(mixed.choices) > MOST_BITS:
            raise ValueError("a codebook has no codes of 8 bits to share out: leave codebook or average_bits out")
        if mixed is not None and intervals is not None:
            raise ValueError(
                "all intervals of timesteps have the same bits: leave timestep_intervals or average_bits out"
            )
        if grids is not None and self.training() is not None:
            raise ValueError("trained methods leave temporal features float: leave temporal_features out")
        if self.centered and self.training() is not None:
            raise ValueError("trained methods do not centre inputs: leave centered out")
        static = activation is not None and not activation.dynamic
        if self.split_inputs and (mixed is not None or self.training() is not None):
            raise ValueError("ranges of parts are for methods that calibrate, with bits of one number")
        if self.split_inputs and activation is not None and activation.granularity in _OF_THE_WHOLE:
            raise ValueError("an input has ranges of its parts, or of frames or timesteps: leave one of the two out")
        return Recipe(
            self.recipe_name, tuple(rules), transform, self.training(), self.rounding(), self.reconstruction(), mixed,
            grids, self.range_search() if static else None, self.channel_statistics(), split_inputs=self.split_inputs,
            switch=self.switched_bits(),
            channel_bits=self.channel_bits(), calibrates_on_all=self.calibrates_on_all, timestep_intervals=intervals,
        )  # fmt: skip
