"""What a layer costs: multiply-adds by layer, for passes that compute a part of the denoiser."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn


def layer_costs(denoiser: nn.Module, axis: Callable[[str], Any], shape: Sequence[int], tokens: int) -> Mapping[str, int]:
    """Multiply-adds of every linear layer and convolution for one row: size of its weight times the places it is applied to."""
    costs = {}
    for path, module in denoiser.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        where = axis(path)
        level = 2**where.level
        grid = -(-shape[0] // level) * -(-shape[1] // level)
        places = {"grid": grid, "text": tokens, "both": grid + tokens, "none": 1}[where.kind]
        costs[path] = module.weight.numel() * places
    return costs


def share_until(costs: Mapping[str, int], layers: tuple[str, ...]) -> float:
    """The cost of a forward that ends after these layers over a whole one's. costs: of `layer_costs`, in the order of the modules.

    A UNet holds its up blocks before its middle one; here they stand in the order in which they run.
    """
    order = ("conv_in", "time", "add", "down", "mid", "up")
    paths = sorted(costs, key=lambda path: next((turn for turn, name in enumerate(order) if path.startswith(name)), len(order)))
    last = max(index for index, path in enumerate(paths) if path.startswith(layers))
    return sum(costs[path] for path in paths[: last + 1]) / sum(costs.values())
