"""Targets for the command line: `tests/targets.py:mlp` and the like, good and bad."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def mlp() -> Any:
    """Three linear layers and a batch with targets."""
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    return model, (torch.randn(4, 12),), torch.randint(0, 5, (4,))


def untaught() -> Any:
    """The same without targets."""
    return mlp()[:2]


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Deep(nn.Module):
    """Four equal layers and a head."""

    def __init__(self, width: int = 8, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def deep() -> Any:
    """A model of equal layers."""
    return Deep(), torch.randn(6, 8), torch.randint(0, 5, (6,))


def separable() -> Any:
    """Two hundred points of two classes, far apart: anything that learns gets them right."""
    y = torch.arange(200) % 2
    x = torch.randn(200, 6) + 6.0 * (y.unsqueeze(1) - 0.5)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, (x,), y


def hostile() -> Any:
    """A model whose module names are markup."""
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>[bold]", nn.Linear(6, 8))
    model.add_module("&amp;", nn.Linear(8, 2))
    y = torch.arange(200) % 2
    return model, (torch.randn(200, 6) + 6.0 * (y.unsqueeze(1) - 0.5),), y


def tokens() -> Any:
    """A model with integer inputs only."""
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7))
    return model, (torch.randint(0, 7, (4, 3)),), torch.randint(0, 7, (4, 3))


def two_layers() -> Any:
    """As little as a rule can be told by, with integer inputs."""
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), (torch.randint(0, 7, (4,)),), torch.randint(0, 7, (4,))


def square_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss that is no cross-entropy."""
    return (outputs - targets).square().mean()


def regression() -> Any:
    """Real-valued targets."""
    return mlp()[0], (torch.randn(4, 12),), torch.randn(4, 5)


# --- bad ones --------------------------------------------------------------------------------------------------------


def raising() -> Any:
    """A factory that fails."""
    raise ValueError("no such weights\nand a second line")


def one_value() -> Any:
    """A model alone."""
    return mlp()[0]


def four_values() -> Any:
    """Too many values."""
    return (*mlp(), None)


def no_model() -> Any:
    """No model at all."""
    return "a model", (torch.randn(4, 12),)


def a_list() -> Any:
    """Inputs that could be anything."""
    return mlp()[0], [torch.randn(4, 12)]


class Undecided(nn.Module):
    """Control flow that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def undecided() -> Any:
    """A model that cannot be captured."""
    return Undecided(), (torch.randn(4, 12),)


not_callable = 3
