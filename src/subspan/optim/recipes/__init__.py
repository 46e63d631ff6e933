"""One file per published method."""

from subspan.optim.recipes.adamw import AdamW
from subspan.optim.recipes.apollo import APOLLO, APOLLOMini
from subspan.optim.recipes.auon import AuON, HybridAuON
from subspan.optim.recipes.badam import BAdam
from subspan.optim.recipes.coap import COAP
from subspan.optim.recipes.dct_adamw import DCTAdamW
from subspan.optim.recipes.fira import Fira
from subspan.optim.recipes.fismo import FISMO
from subspan.optim.recipes.flora import Flora
from subspan.optim.recipes.frugal import FRUGAL
from subspan.optim.recipes.galore import GaLore
from subspan.optim.recipes.galore2 import GaLore2
from subspan.optim.recipes.galore_plus import GaLorePlus
from subspan.optim.recipes.grasswalk import GrassJump, GrassWalk
from subspan.optim.recipes.gum import GUM
from subspan.optim.recipes.ldadam import LDAdam
from subspan.optim.recipes.muon import Muon
from subspan.optim.recipes.online_subspace_descent import OnlineSubspaceDescent
from subspan.optim.recipes.polynomial import Polynomial
from subspan.optim.recipes.q_galore import QGaLore
from subspan.optim.recipes.sara import SARA
from subspan.optim.recipes.sgd import SGD
from subspan.optim.recipes.subset_norm import AdamSNSM, SubsetNorm, SubspaceMomentum
from subspan.optim.recipes.subtrack import SubTrackPP
from subspan.optim.recipes.swats import SWATS
from subspan.optim.recipes.tensor_galore import TensorGaLore
from subspan.optim.recipes.trion import Trion

__all__ = [
    "APOLLO",
    "COAP",
    "FISMO",
    "FRUGAL",
    "GUM",
    "SARA",
    "SGD",
    "SWATS",
    "APOLLOMini",
    "AdamSNSM",
    "AdamW",
    "AuON",
    "BAdam",
    "DCTAdamW",
    "Fira",
    "Flora",
    "GaLore",
    "GaLore2",
    "GaLorePlus",
    "GrassJump",
    "GrassWalk",
    "HybridAuON",
    "LDAdam",
    "Muon",
    "OnlineSubspaceDescent",
    "Polynomial",
    "QGaLore",
    "SubTrackPP",
    "SubsetNorm",
    "SubspaceMomentum",
    "TensorGaLore",
    "Trion",
]
