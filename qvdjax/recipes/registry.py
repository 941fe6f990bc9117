"""Recipes by name."""

import dataclasses
import re
import types
import typing

from qvdjax.errors import UserError
from qvdjax.numerics import BITS
from qvdjax.recipes.adaround import AdaRound
from qvdjax.recipes.best import Best, BestUNet
from qvdjax.recipes.dsaquant import DSAQuant
from qvdjax.recipes.dvd_quant import DVDQuant
from qvdjax.recipes.efficientdm import EfficientDM
from qvdjax.recipes.flatquant import FlatQuant
from qvdjax.recipes.fp8 import Float8
from qvdjax.recipes.gptq import GPTQ
from qvdjax.recipes.lsq import LearnedStepSize
from qvdjax.recipes.method import FLOAT_ACTIVATION_BITS, Method
from qvdjax.recipes.minmax import MinMax
from qvdjax.recipes.mpq_dm import MPQDM
from qvdjax.recipes.mse import MSE
from qvdjax.recipes.orbitquant import OrbitQuant
from qvdjax.recipes.ptq4dit import PTQ4DiT
from qvdjax.recipes.ptq4dm import PTQ4DM
from qvdjax.recipes.q_diffusion import QDiffusion
from qvdjax.recipes.q_dit import QDiT
from qvdjax.recipes.q_dm import QDM
from qvdjax.recipes.q_vdit import QVDiT
from qvdjax.recipes.quarot import QuaRot
from qvdjax.recipes.qvd import QVD, QVDPaper
from qvdjax.recipes.qvgen import QVGen, QVGenCode, QVGenPaper
from qvdjax.recipes.rtn import RoundToNearest
from qvdjax.recipes.rules import Recipe
from qvdjax.recipes.s2q_vdit import S2QVDiT
from qvdjax.recipes.smoothquant import SmoothQuant
from qvdjax.recipes.svdquant import SVDQuant
from qvdjax.recipes.tcaq_dm import TCAQDM
from qvdjax.recipes.tdq import TDQ
from qvdjax.recipes.tfmq_dm import TFMQDM
from qvdjax.recipes.vidit_q import ViDiTQ

POST_TRAINING = (
    RoundToNearest, MinMax, MSE, SmoothQuant, QuaRot, GPTQ, AdaRound, SVDQuant, PTQ4DiT, ViDiTQ, QDiT, DVDQuant,
    OrbitQuant, FlatQuant, S2QVDiT, Best, QVDiT, PTQ4DM, QDiffusion, TFMQDM, TDQ, TCAQDM, MPQDM, QVD,
    QVDPaper, BestUNet, Float8,
)  # fmt: skip
TRAINED = (LearnedStepSize, QDM, EfficientDM, QVGen, QVGenPaper, QVGenCode, DSAQuant)
METHODS = {method.name: method for method in (*POST_TRAINING, *TRAINED)}


def names() -> list[str]:
    """The presets; `get` also takes any other bits from 2 to 8, and `a16` for float activations."""
    every = METHODS.values()
    return [method(weight_bits=w, activation_bits=a).recipe_name for method in every for w, a in method.preset_bits]


def method_of(name: str) -> tuple[type[Method], int, int]:
    """Method, weight bits and activation bits of `<method>-w<bits>a<bits>`; UserError for anything else."""
    match = re.fullmatch(r"(.+)-w(\d+)a(\d+)", name)
    if not match or match[1] not in METHODS:
        raise UserError(
            f"unknown recipe {name!r}", remedy=f"write METHOD-wBITSaBITS with METHOD of {', '.join(METHODS)}"
        )
    weight_bits, activation_bits = int(match[2]), int(match[3])
    if weight_bits not in BITS or activation_bits not in (*BITS, FLOAT_ACTIVATION_BITS):
        raise UserError(
            f"recipe {name!r}: bits out of range", remedy="weights take 2 to 8 bits, activations 2 to 8 or 16"
        )
    return METHODS[match[1]], weight_bits, activation_bits


def get(name: str, **overrides) -> Recipe:
    """The recipe of a name, with some of its method's options overridden (strings are parsed by the option's type).

    Raises:
        UserError: Unknown name or option, or a value that the option cannot take.
    """
    method, weight_bits, activation_bits = method_of(name)
    hints = typing.get_type_hints(method)
    options = {field.name for field in dataclasses.fields(method)} - {"weight_bits", "activation_bits"}
    if unknown := sorted(set(overrides) - options):
        raise UserError(
            f"recipe {name!r} has no such option", remedy=f"options: {', '.join(sorted(options))}", items=unknown
        )
    values = {key: _parse(key, value, hints[key]) for key, value in overrides.items()}
    try:
        return method(weight_bits=weight_bits, activation_bits=activation_bits, **values).recipe()
    except re.error as error:
        raise UserError(
            f"recipe {name!r}: option skip={values['skip']!r} is no regular expression ({error})", remedy="mend it"
        ) from error
    except ValueError as error:
        raise UserError(
            f"recipe {name!r}: {error}", remedy="see the option's description in `qvdjax recipes`"
        ) from error


def _parse(key, value, hint):
    """A string as the option's type; other values as they are."""
    if not isinstance(value, str) or hint is str:
        return value
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and value.lower() == "none":
        return None
    kind = next(k for k in kinds if k is not type(None))
    try:
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError) as error:
        raise UserError(f"option {key}={value!r} is no {kind.__name__}", remedy=f"give a {kind.__name__}") from error
