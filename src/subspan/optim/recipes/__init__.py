"""One file per published method."""

from subspan.optim.recipes.adamw import AdamW
from subspan.optim.recipes.apollo import APOLLO, APOLLOMini
from subspan.optim.recipes.fira import Fira
from subspan.optim.recipes.flora import Flora
from subspan.optim.recipes.frugal import FRUGAL
from subspan.optim.recipes.galore import GaLore
from subspan.optim.recipes.ldadam import LDAdam
from subspan.optim.recipes.tensor_galore import TensorGaLore

__all__ = ["APOLLO", "FRUGAL", "APOLLOMini", "AdamW", "Fira", "Flora", "GaLore", "LDAdam"]
