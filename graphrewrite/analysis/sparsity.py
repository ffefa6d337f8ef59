"""How many of a block's activations are zero."""

from __future__ import annotations

import torch

from graphrewrite.graph.joint import JointGraph
from graphrewrite.graph.nodes import NodeInfo, Role, info


def tap_zeros(graph: JointGraph) -> None:
    """Tap, for each block that hands activations on, the share of zeros in them, over all forward passes."""
    copies = dict.fromkeys(info(node).copy for node in graph.forward_nodes())
    for block in graph.blocks:
        boundaries = [node for copy in copies for node in graph.boundaries(block.name, copy=copy)]
        if boundaries:
            like = NodeInfo(role=Role.FORWARD, block=block.name, module=block.name)
            graph.tap(graph.splice(_share_of_zeros, boundaries, like=like), block.name)


def _share_of_zeros(*activations: torch.Tensor) -> torch.Tensor:
    return torch.cat([(h == 0).flatten() for h in activations]).to(torch.float32).mean()
