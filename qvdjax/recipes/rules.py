"""Recipes: ordered rules over roles and paths that say what each layer becomes."""

import dataclasses
import re
from typing import Any, Literal

from qvdjax.calibration.timestep_draw import TimestepDraw
from qvdjax.errors import UserError
from qvdjax.nn import Attention, AttentionScheme, Conv, LayerScheme, Linear, TimestepIntervals, VideoModel, layers_of
from qvdjax.recipes.training import Training


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of the layers that it matches; of several rules the first that matches decides.

    Attributes:
        scheme: The decision. For role "attention" an AttentionScheme.
        roles: Roles that match; empty for all.
        path: Regular expression that the whole path in diffusers must match; empty for all. A path that matches no
            layer of the model is an error, because it is a typing mistake; a role may be absent.
    """

    scheme: LayerScheme | AttentionScheme
    roles: tuple[str, ...] = ()
    path: str = ""

    def __post_init__(self):
        re.compile(self.path)  # re.error here rather than in the middle of a model

    def matches(self, name: str, role: str) -> bool:
        """Whether a layer is meant."""
        return (not self.roles or role in self.roles) and (not self.path or re.fullmatch(self.path, name) is not None)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method at given bits.

    Attributes:
        name: `<method>-w<bits>a<bits>`.
        rules: First match decides; a layer that none matches stays float.
        transform: Fits what the inputs of quantized products pass through (see `qvdjax.ptq.transforms`), or None.
        training: How its models are trained; None where quantizing makes them, and training may follow by the
            straight-through estimator.
        rounding: How the weights of linear layers are rounded (see `qvdjax.ptq.gptq`), None for the nearest code.
        reconstruction: How transforms and clips are trained block by block (see `qvdjax.ptq.reconstruction`), None for
            not at all.
        mixed_precision: How bits of weights are shared out (see `qvdjax.ptq.mixed_precision`), None for as rules say.
        feature_grids: Among which grids temporal features are rounded (see `qvdjax.ptq.feature_grids`), None for float.
        range_search: How static ranges are searched for (see `qvdjax.ptq.range_search`) or learned
            (`qvdjax.ptq.timestep_scales`), None for the widest seen.
        channel_statistics: Whether the ranges of channels, which transforms are fitted to, are those of "all" sampling
            steps, of the "first", where latents are noise, of each "step" on its own, or means over steps, of which no
            static range follows: by "salience" (`qvdjax.calibration.salience`), or of each step's "magnitude"
            (`qvdjax.calibration.magnitudes`).
        draw: Which inputs are drawn from a calibration set, None for all of it.
        split_inputs: Whether the arrays that a convolution's input is made of have ranges of their own.
        switch: At which sampling steps inputs get more bits (see `qvdjax.ptq.bit_switch`), None for none.
        channel_bits: How bits are shared out among a weight's output channels (see `qvdjax.ptq.channel_bits`), None for
            all alike.
        calibrates_on_all: Whether ranges, transforms and grids are found on all of a calibration set although
            reconstruction selects examples from it.
        timestep_intervals: In each of which products are quantized on their own, None for all timesteps together.
    """

    name: str
    rules: tuple[Rule, ...]
    transform: Any = None
    training: Training | None = None
    rounding: Any = None
    reconstruction: Any = None
    mixed_precision: Any = None
    feature_grids: Any = None
    range_search: Any = None
    channel_statistics: Literal["all", "first", "step", "salience", "magnitude"] = "all"
    draw: TimestepDraw | None = None
    split_inputs: bool = False
    switch: Any = None
    channel_bits: Any = None
    calibrates_on_all: bool = False
    timestep_intervals: TimestepIntervals | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing needs to see the inputs of layers, or which timesteps there are."""
        inputs = (
            self.rounding, self.reconstruction, self.mixed_precision, self.feature_grids, self.range_search,
            self.switch, self.channel_bits,
        )  # fmt: skip
        return self.needs_ranges or any(part is not None for part in inputs)

    @property
    def needs_ranges(self) -> bool:
        """Whether quantizing needs the smallest and largest value of each input channel."""
        static = [
            rule for rule in self.rules
            if isinstance(rule.scheme, LayerScheme) and rule.scheme.activation and not rule.scheme.activation.dynamic
        ]  # fmt: skip
        fitted = self.transform is not None and self.transform.needs_calibration
        return fitted or (bool(static) and self.range_search is None)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a recipe says about a model: one scheme a layer and block, and the roles it names that are absent."""

    schemes: dict[str, LayerScheme | AttentionScheme]
    absent_roles: tuple[str, ...]


def decide(model: VideoModel, recipe: Recipe) -> Decision:
    """Apply the rules to every layer of a float model (abstract or not).

    Raises:
        UserError: A rule with a path matches nothing.
    """
    schemes, present = {}, set()
    for names, _, layer in layers_of(model):
        present.add(layer.role)
        for name in names:
            decisions = (rule.scheme for rule in recipe.rules if rule.matches(name, layer.role))
            scheme = next(decisions, None) or LayerScheme(reason="no rule of the recipe names it")
            schemes[name] = _for_products(scheme) if isinstance(layer, Attention) else _for_layer(scheme, layer, recipe)
    dead = [rule.path for rule in recipe.rules if rule.path and not _reaches(model, rule)]
    if dead:
        raise UserError(
            f"recipe {recipe.name}: rules match no layer of this model",
            remedy="see `qvdjax info` for the paths", items=dead,
        )  # fmt: skip
    named = {role for rule in recipe.rules for role in rule.roles}
    return Decision(schemes, tuple(sorted(named - present)))


def _for_products(scheme: LayerScheme | AttentionScheme) -> AttentionScheme:
    """A rule about layers leaves the products of attention float."""
    return scheme if isinstance(scheme, AttentionScheme) else AttentionScheme(reason=scheme.reason)


def _for_layer(scheme: LayerScheme, layer: Linear | Conv, recipe: Recipe) -> LayerScheme:
    """The scheme as it fits the input of a layer.

    Where frames lie nowhere in it, they have no ranges of their own: there is one for all of it. Where it is made of
    parts, these have ranges of their own if the recipe says so.
    """
    if recipe.split_inputs and isinstance(layer, Conv) and layer.parts is not None and scheme.quantizes:
        reason = f"{scheme.reason}; its input is {len(layer.parts)} arrays, each with ranges of its own"
        return dataclasses.replace(scheme, split=layer.parts, reason=reason)
    activation = scheme.activation
    if activation is None or activation.granularity != "frame" or layer.frame_axis is not None:
        return scheme
    return dataclasses.replace(scheme, activation=dataclasses.replace(activation, granularity="tensor"))


def _reaches(model, rule) -> bool:
    return any(rule.matches(name, layer.role) for names, _, layer in layers_of(model) for name in names)
