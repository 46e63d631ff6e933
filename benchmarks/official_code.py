"""Importing the authors' code: repositories from a folder, each without disturbing the others.

Repositories that are not on PyPI are looked for under `$SUBSPAN_OFFICIAL_CODE/<repository>`;
`benchmarks.machine.REPOSITORIES` lists them with the commits that the shims were checked with:

    mkdir official && cd official
    git clone https://github.com/bytedance/coap && git -C coap checkout deabc3a
    ...
    SUBSPAN_OFFICIAL_CODE=$PWD make -C .. bench

Nothing of them is installed or run but the modules that are compared. Two of them install the same
package name as a PyPI package and others have modules called `utils`, so each is imported with its
own folder first on the path, and its modules are taken out of `sys.modules` again. What such a
module needs on a CPU is replaced inside that module only: nobody else in the process sees it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.contenders import LEARNING_RATE
from benchmarks.machine import FOLDER_VARIABLE, official_folder
from benchmarks.shapes import Parameters


def _folder(repository: str) -> Path:
    folder = official_folder(repository)
    if folder is None:
        raise ImportError(f"{FOLDER_VARIABLE} has no folder {repository}")
    return folder


def stub(name: str, /, **contents: Any) -> ModuleType:
    """A module that stands in for one that is imported but not used in a step."""
    module = ModuleType(name)
    vars(module).update(contents)
    return module


@contextmanager
def _only(folder: Path, stubs: Mapping[str, ModuleType]) -> Iterator[None]:
    """`folder` comes first on the path; what is imported from it is forgotten afterwards."""
    own = {path.stem for path in folder.iterdir() if path.is_dir() or path.suffix == ".py"}
    own.discard("__pycache__")

    def concerned() -> dict[str, ModuleType]:
        return {
            name: module
            for name, module in sys.modules.items()
            if name in stubs or name.partition(".")[0] in own
        }

    hidden = concerned()
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(stubs)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(hidden)


@functools.cache
def from_repository(
    repository: str,
    module: str,
    *,
    bare: str = "",
    stubs: tuple[tuple[str, str], ...] = (),
) -> ModuleType:
    """Import `module` of a repository.

    Args:
        repository: folder name under `$SUBSPAN_OFFICIAL_CODE`.
        module: dotted name of the module, as the repository itself imports it.
        bare: a package whose `__init__` is not run, because it loads compiled CUDA extensions.
        stubs: (module, name) pairs: modules that are replaced by an empty one with `name` in it.

    Raises:
        ImportError: the variable is not set, or the repository or a dependency is missing.
    """
    folder = _folder(repository)
    standing_in = {name: stub(name, **{content: None}) for name, content in stubs}
    if bare:
        standing_in[bare] = stub(bare, __path__=[str(folder / bare)])
    with _only(folder, standing_in):
        return importlib.import_module(module)


def torch_with(**replaced: Any) -> ModuleType:
    """A copy of the name `torch` with some entries replaced, for use inside one module."""
    return stub("torch", **{**vars(torch), **replaced})


def without_synchronize() -> ModuleType:
    """`torch` whose `cuda.synchronize()` does nothing instead of asking for a GPU."""
    return torch_with(cuda=stub("torch.cuda", **{**vars(torch.cuda), "synchronize": lambda: None}))


@contextmanager
def supplied(module: ModuleType, **names: Any) -> Iterator[None]:
    """Give a module names that it no longer has, while something that wants them is imported."""
    missing = {name: value for name, value in names.items() if not hasattr(module, name)}
    vars(module).update(missing)
    try:
        yield
    finally:
        for name in missing:
            delattr(module, name)


def silent(*_: object, **__: object) -> None:
    """Takes the place of `print` in a module that reports on every parameter."""


def groups(p: Parameters, **projected: Any) -> list[dict[str, Any]]:
    """Everything that is not projected first, then the matrices with what a method asks of them."""
    return [{"params": p.plain}, {"params": p.projected, **projected}]


def gradients(p: Parameters) -> Callable[[], None]:
    """For steps that replace `.grad` or set it to None: puts back the gradients of this moment."""
    kept = [(parameter, parameter.grad) for parameter in p.plain + p.projected]

    def restore() -> None:
        for parameter, gradient in kept:
            parameter.grad = gradient

    return restore


def with_gradients(optimizer: Optimizer, restore: Callable[[], None]) -> Optimizer:
    """Call `restore` before each step: for code that drops the gradients, or replaces them.

    It only sets attributes, which takes microseconds, and is therefore left inside the clock.
    """
    optimizer.register_step_pre_hook(lambda *_: restore())
    return optimizer


class Together(Optimizer):
    """Two optimizers for disjoint parameters, stepped one after the other, with one state."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.members = (first, second)
        super().__init__([group for o in self.members for group in o.param_groups], {})
        for member in self.members:
            member.state = self.state

    def step(self, closure: Any = None) -> Any:
        """The members' steps in turn; there is no closure here."""
        for member in self.members:
            member.step()


def beside_adamw(optimizer: Optimizer, p: Parameters) -> Optimizer:
    """For optimizers of matrices only: the rest gets the fastest AdamW there is."""
    return Together(torch.optim.AdamW(p.plain, lr=LEARNING_RATE, fused=True), optimizer)
