"""`quantize`: a model and a recipe in, the quantized model out."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax

from qvdjax.calibration.dataset import CalibrationSet
from qvdjax.calibration.magnitudes import input_magnitudes
from qvdjax.calibration.ranges import input_ranges, input_ranges_by_timestep
from qvdjax.calibration.salience import input_saliences
from qvdjax.calibration.selection import SelectedInputs, select
from qvdjax.calibration.steps import InInterval, first_steps
from qvdjax.calibration.timestep_draw import draw
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, Execution, VideoModel, layers_of, refuse_tables
from qvdjax.ptq import (
    FitChannelScale,
    FitRotation,
    FitShift,
    TimestepScales,
    absorb_rotations,
    absorb_scales,
    apply_schemes,
    fill_feature_grids,
    fit_feature_grids,
    reconstruct,
    rounded_layers,
    search_ranges,
    search_scales,
    share_out_channels,
    timestep_ranges,
    with_counts,
    with_gains,
    with_shifts_of_timesteps,
    with_switched_bits,
)  # fmt: skip
from qvdjax.ptq.feature_grids import temporal_features
from qvdjax.ptq.mixed_precision import with_mixed_precision
from qvdjax.ptq.reconstruction import FinishedBlocks
from qvdjax.ptq.reconstruction.engine import Progress
from qvdjax.recipes import Recipe, decide, get


def best_execution() -> tuple[Execution, str]:
    """How products are best computed on this machine's default device, and why."""
    kind = jax.devices()[0].device_kind
    if "7x" in kind.lower() or "v7" in kind.lower():
        return "simulate", f"{kind} multiplies int8 more slowly than bf16; the same integers are multiplied as floats"
    return "integer", f"{kind} multiplies int8 codes into int32"


def quantize(
    model: VideoModel,
    recipe: Recipe | str,
    calibration: Iterable[Mapping[str, jax.Array]] | None = None,
    *,
    execution: Execution | None = None,
    finished: FinishedBlocks | None = None,
    progress: Progress | None = None,
) -> VideoModel:
    """Quantize a float model.

    Args:
        model: Left as it is.
        recipe: A recipe, or its name (`qvdjax.recipes.names()` lists presets).
        calibration: Batches of the model's keyword arguments (latents, timestep, context), for instance of a
            `qvdjax.calibration.CalibrationSet`; needed by recipes with static ranges, fitted transforms,
            compensated rounding or reconstruction. Where a recipe selects or draws samples, it does so from a
            CalibrationSet; any other batches are taken as they are.
        execution: "integer", "simulate", or None for the device's best.
        finished: Where blocks are kept that are reconstructed, to go on after an interruption.
        progress: Called with ("reconstructing", blocks done, blocks in all).

    Returns:
        A new model of the same call. `qvdjax.describe` lists what every layer became.

    Raises:
        UserError: Unknown recipe, a path rule that matches nothing, a missing calibration, a model that is quantized
            or has tables.
    """
    if isinstance(recipe, str):
        recipe = get(recipe)
    if recipe.training is not None:
        raise UserError(
            f"the quantizers of {recipe.name} are trained", remedy="make the model with `qvdjax train DIR OUT`"
        )
    if any(True for _ in layers_of(model, QUANTIZED_LAYERS)):
        raise UserError("the model is quantized already", remedy="start from the full-precision model")
    refuse_tables(model, "the model", "quantize the model it was made from, and tabulate the result")
    schemes = decide(model, recipe).schemes
    if isinstance(recipe.transform, FitRotation) and recipe.transform.absorb:
        model, schemes = absorb_rotations(model, schemes, recipe.transform)
    ranges = rounded = edges = fitted = None
    levels: dict = {}
    if recipe.needs_calibration:
        if calibration is None:
            raise UserError(f"recipe {recipe.name} needs a calibration set", remedy="make one with `qvdjax calibrate`")
        fit, plan = recipe.transform, recipe.reconstruction
        calibration = list(calibration) if iter(calibration) is calibration else calibration
        examples, calibration = _examples_and_rest(recipe, calibration)
        if recipe.draw is not None and isinstance(calibration, CalibrationSet):
            calibration = draw(calibration, recipe.draw)
        if recipe.needs_ranges:
            ranges = _channel_ranges(model, recipe, calibration)
            if recipe.channel_statistics == "step":
                schemes = with_shifts_of_timesteps(schemes, calibration)
        if isinstance(fit, FitChannelScale) and fit.absorb:
            model, schemes, ranges = absorb_scales(model, schemes, ranges, fit)
        if isinstance(fit, FitShift) and fit.search is not None:
            fitted = search_scales(model, schemes, _fitted_on(recipe, calibration), fit.search, ranges)
        if recipe.range_search is not None:
            if isinstance(recipe.range_search, TimestepScales):
                edges = timestep_ranges(model, schemes, calibration, recipe.range_search)
            else:
                edges = search_ranges(
                    model, schemes, calibration, recipe.range_search, fit=fit, ranges=ranges, fitted=fitted
                )
            schemes = with_counts(schemes, edges, calibration)
        if recipe.mixed_precision is not None:
            schemes = with_mixed_precision(model, schemes, calibration, recipe.mixed_precision, fit=fit, ranges=ranges)
        if recipe.switch is not None:
            schemes = with_switched_bits(model, schemes, calibration, recipe.switch)
        if recipe.feature_grids is not None:
            schemes, levels = fit_feature_grids(model, schemes, recipe.feature_grids, calibration)
        learned = None
        if recipe.channel_bits is not None:
            schemes, learned = share_out_channels(
                model, schemes, calibration, recipe.channel_bits, fit=fit, ranges=ranges
            )
        if plan is not None and plan.estimation is not None and plan.estimation.of_frames:
            schemes = with_gains(model, schemes, next(iter(calibration), None))
        if plan is not None:
            done = reconstruct(
                model, schemes, examples, plan, fit=fit, ranges=ranges, edges=edges, fitted=fitted, levels=levels,
                features=temporal_features(model, calibration) if plan.features == "timestep" else None,
                finished=finished, progress=progress,
            )  # fmt: skip
            learned = done.layers
        if recipe.rounding is not None or learned is not None:
            rounded = rounded_layers(
                model, schemes, calibration, recipe.rounding, fit=fit, ranges=ranges, edges=edges, learned=learned,
                fitted=fitted,
            )  # fmt: skip
    execution = execution or best_execution()[0]
    quantized = apply_schemes(
        model, schemes, execution=execution, fit=recipe.transform, ranges=ranges, edges=edges, rounded=rounded,
        fitted=fitted,
    )  # fmt: skip
    fill_feature_grids(quantized, levels)
    quantized.recipe_name = recipe.name
    return quantized


def _examples_and_rest(recipe: Recipe, calibration):
    """What is reconstructed on, and what everything else is calibrated on: all of the set, if the recipe says so.

    Whoever selected the examples already may have given these alone.
    """
    plan = recipe.reconstruction
    if plan is not None and plan.selection is not None and isinstance(calibration, CalibrationSet):
        calibration = select(calibration, plan.selection)
    if recipe.calibrates_on_all and isinstance(calibration, SelectedInputs):
        return calibration, calibration.calibration
    return calibration, calibration


def _channel_ranges(model: VideoModel, recipe: Recipe, calibration: Iterable[Mapping[str, jax.Array]]) -> dict:
    """Smallest and largest input of each channel by layer, as the recipe takes them over steps; a pair for each
    interval of timesteps where the recipe has some."""
    if (intervals := recipe.timestep_intervals) is not None:
        of_all = dataclasses.replace(recipe, timestep_intervals=None)
        parts = [
            _channel_ranges(model, of_all, InInterval(calibration, intervals, number))
            for number in range(len(intervals))
        ]
        return {name: tuple(part[name] for part in parts) for name in parts[0]}
    if recipe.channel_statistics == "salience":
        return input_saliences(model, calibration)
    if recipe.channel_statistics == "magnitude":
        return input_magnitudes(model, calibration)
    if recipe.channel_statistics == "step":
        return input_ranges_by_timestep(model, calibration)
    return input_ranges(model, _fitted_on(recipe, calibration))


def _fitted_on(recipe: Recipe, calibration: Iterable[Mapping[str, jax.Array]]) -> Iterable[Mapping[str, jax.Array]]:
    """The part of a calibration set that transforms are fitted to."""
    return first_steps(calibration) if recipe.channel_statistics == "first" else calibration
