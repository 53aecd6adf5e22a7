"""What a model tells the optimizer about its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ModelPart:
    """Parameters that train at one learning rate and with one weight decay.

    `depth_from_top`: in the encoder, layers between these parameters and its output; a rate with
    layer-wise decay is multiplied by the decay so many times. 0 elsewhere.
    `without_decay`: biases, norms, embeddings and layer scales of the encoder, which get no weight
    decay.
    """

    name: str  # "encoder", "decoder" or "other"
    parameters: list[nn.Parameter]  # those that require a gradient
    depth_from_top: int = 0
    without_decay: bool = False


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters that require a gradient, in its own order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
