"""Shallow copies of modules: other parts in them, every weight shared, the caller's own left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from torch import nn


def clone(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """Return a shallow copy of `module` with some children replaced."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = {**module._modules, **children}
    return copied


def with_part(module: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """Return a shallow copy of `module` with another part at a dotted path."""
    name, _, rest = path.partition(".")
    return clone(module, {name: with_part(getattr(module, name), rest, part) if rest else part})


def rewritten(module: nn.Module, rewrite: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return a copy in which `rewrite` was applied to each module, the innermost first.

    It returns the module it was given where there is nothing to change; so does this.
    """
    children = {k: None if v is None else rewritten(v, rewrite) for k, v in module._modules.items()}
    if any(children[name] is not child for name, child in module._modules.items()):
        module = clone(module, children)
    return rewrite(module)
