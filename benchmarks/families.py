"""Families: ours, the authors' and other implementations of one method, stepped in turn."""

from __future__ import annotations

from benchmarks.contenders import Contender
from benchmarks.official import official_contenders
from benchmarks.ours import our_contenders
from benchmarks.peers import package_contenders, reference

# Those that have always been compared: at both model sizes, and longer than the others.
EARLIER = ("adamw", "galore", "fira", "apollo", "apollo_mini")


def families() -> dict[str, list[Contender]]:
    """Every family by its name: ours first, then its peers, torch's fused AdamW last."""
    members: dict[str, list[Contender]] = {}
    for contender in [*our_contenders(), *package_contenders(), *official_contenders()]:
        members.setdefault(contender.family, []).append(contender)
    return {name: [*others, reference(name)] for name, others in members.items()}
