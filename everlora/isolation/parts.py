"""Cutting a network into parts that a task can have its own version of."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from everlora.errors import ModelError

__all__ = ["find_blocks", "parts_of", "unread_children"]


def unread_children(model: nn.Module, num_parameters: int) -> tuple[str, ...]:
    """Names of the last top-level children that features do not depend on: a classifier of other classes.

    Args:
        model: the network.
        num_parameters: how many of its parameters the features depend on.

    Raises:
        ModelError: no run of last children has as many parameters as are left over.
    """
    left_over = sum(parameter.numel() for parameter in model.parameters()) - num_parameters
    names = []
    for name, child in reversed(list(model.named_children())):
        if left_over > 0:
            names.append(name)
            left_over -= sum(parameter.numel() for parameter in child.parameters())
    if left_over:
        raise ModelError(
            f"expected the features to pass all but the last children of {type(model).__name__}, found "
            f"{num_parameters} parameters in use, which no cut between children explains; drop what is not used"
        )
    return tuple(names)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated blocks of a network, in order: residual blocks, or the layers of a transformer.

    Blocks are the children of lists or sequences whose members are all of one class and have parts themselves. Where
    there are several kinds, the one with the most parameters counts.
    """
    kinds: dict[type[nn.Module], list[str]] = {}
    sizes: dict[type[nn.Module], int] = {}
    for name, block in _outermost_blocks(model, ""):
        kinds.setdefault(type(block), []).append(name)
        sizes[type(block)] = sizes.get(type(block), 0) + sum(p.numel() for p in block.parameters())
    return kinds[max(sizes, key=lambda kind: sizes[kind])] if kinds else []


def _outermost_blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    one_class = len({type(child) for _, child in children}) == 1
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and one_class and any(children[0][1].children()):
        yield from ((prefix + name, child) for name, child in children)
        return
    for name, child in children:
        yield from _outermost_blocks(child, f"{prefix}{name}.")


def parts_of(model: nn.Module, points: Collection[str], *, without: Collection[str] = ()) -> list[str]:
    """Cut a network into the largest parts such that each point is a part of its own.

    Parameters that belong directly to a module above a point are in no part.

    Args:
        model: the network.
        points: qualified names of modules, none below another.
        without: names of top-level children to leave out.

    Returns:
        Names of all parts that have parameters or buffers, in the order of the network.
    """
    chosen = set(points)
    above = {point.rsplit(".", depth)[0] for point in chosen for depth in range(1, point.count(".") + 1)}

    def visit(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = prefix + name
            if path in without:
                continue
            if path in above and path not in chosen:
                yield from visit(child, f"{path}.")
            elif child.state_dict():
                yield path

    return list(visit(model, ""))
