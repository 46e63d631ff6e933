"""The parts that a composition is made of; see docs/ARCHITECTURE.md for the words.

Refresh, transport, inner, output, remainder, normaliser, activity, storage.
"""

from subspan.optim.parts.activity import Blocks, LayerBlocks, Sampled
from subspan.optim.parts.adafactor import Adafactor
from subspan.optim.parts.auon import AuON
from subspan.optim.parts.descent import SGD, AverageMomentum, Lion, SignDescent
from subspan.optim.parts.fismo import FISMO
from subspan.optim.parts.inner import Adam, Inner
from subspan.optim.parts.muon import Muon
from subspan.optim.parts.normaliser import FactoredRMS, SubsetNorm
from subspan.optim.parts.output import (
    Discard,
    ErrorFeedback,
    Lift,
    NormScaled,
    PassThrough,
    RescaledGradient,
    SignedLift,
    Stateless,
)
from subspan.optim.parts.refresh import Every, Lazy, OnDrift, Refresh
from subspan.optim.parts.storage import Storage
from subspan.optim.parts.transport import Keep, ProjectionAware, Reset, Rotate

__all__ = [
    "FISMO",
    "SGD",
    "Adafactor",
    "Adam",
    "AuON",
    "AverageMomentum",
    "Blocks",
    "Discard",
    "ErrorFeedback",
    "Every",
    "FactoredRMS",
    "Inner",
    "Keep",
    "LayerBlocks",
    "Lazy",
    "Lift",
    "Lion",
    "Muon",
    "NormScaled",
    "OnDrift",
    "PassThrough",
    "ProjectionAware",
    "Refresh",
    "RescaledGradient",
    "Reset",
    "Rotate",
    "Sampled",
    "SignDescent",
    "SignedLift",
    "Stateless",
    "Storage",
    "SubsetNorm",
]
