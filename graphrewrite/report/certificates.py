"""Certificates as plain data."""

from __future__ import annotations

from typing import Any

from graphrewrite.analysis.certificates import BlockCertificate, Certificates

PROPERTIES = ("weight_transport", "backward_locked", "update_locked", "global_error")
"""The yes-or-no properties, in the order they are shown in."""


def to_json(rule: str, held: Certificates) -> dict[str, Any]:
    """The certificates of one rule's graph.

    Returns:
        `rule`; each property, `locality_radius` and `backward_depth`, of the whole graph; `forward_passes`;
        `saved_bytes` by block; `blocks`, where a property is `{"holds", "path"}`: the chain of nodes that proves it.
    """
    return {
        "rule": rule,
        **{name: getattr(held, name) for name in PROPERTIES},
        "locality_radius": held.locality_radius,
        "backward_depth": held.backward_depth,
        "forward_passes": held.forward_passes,
        "saved_bytes": held.saved_bytes,
        "blocks": [_block(block) for block in held.blocks],
    }


def _block(block: BlockCertificate) -> dict[str, Any]:
    findings = {name: getattr(block, name) for name in PROPERTIES}
    return {
        "block": block.block,
        "rule": block.rule,
        **{name: {"holds": found.holds, "path": list(found.path)} for name, found in findings.items()},
        "locality_radius": block.locality_radius,
        "backward_depth": block.backward_depth,
        "affine_reads": list(block.affine_reads),
        "sign_reads": list(block.sign_reads),
        "local_reads": list(block.local_reads),
    }
