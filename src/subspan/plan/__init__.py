"""What training will need in memory, before it is started.

The model and the very optimizer that will run are built on the meta device; what the optimizer's
parts declare is what it will allocate. Activations come from running the model's own code on
tensors without memory. `subspan plan` is the command line of it.
"""

from subspan.plan.measure import Comparison, measure
from subspan.plan.model import ModelSpec
from subspan.plan.planning import make_plan
from subspan.plan.result import Plan, as_dict
from subspan.plan.search import Outcome, search
from subspan.plan.settings import Settings

__all__ = [
    "Comparison",
    "ModelSpec",
    "Outcome",
    "Plan",
    "Settings",
    "as_dict",
    "make_plan",
    "measure",
    "search",
]
