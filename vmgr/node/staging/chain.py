"""Images that are layers on others: what a disk is made of, from the image itself down to one that stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from vmgr.errors import Code, VTorqueError
from vmgr.images.pool import Image, Pool

MAX_LAYERS = 8
"""Disks that may lie on one another in the pool: each is looked into for what those above it do not have."""


def chain_of(pool: Pool, image: Image) -> list[Image]:
    """The image, its parent, the parent's parent, and so on.

    Raises VTorqueError (VT-IMAGE) where a parent is not in the pool, has no disk, is larger than what lies on it, where
    a layer is not qcow2, or where there are more than MAX_LAYERS.
    """
    chain = [image]
    while chain[-1].parent is not None:
        above = chain[-1]
        if len(chain) == MAX_LAYERS:
            raise VTorqueError(
                f"the image {image.reference} lies on more than {MAX_LAYERS - 1} others",
                code=Code.IMAGE,
                hint="save a guest of it with --flat and use that image",
            )
        try:
            parent = pool.get(str(above.parent))
        except VTorqueError as err:
            raise VTorqueError(
                f"the image {above.reference} is a layer on {above.parent}, which cannot be used: {err.detail}",
                code=Code.IMAGE,
            ) from err
        why = _misfit(above, parent)
        if why is not None:
            raise VTorqueError(
                f"the image {above.reference} cannot be a layer on {above.parent}: {why}", code=Code.IMAGE
            )
        chain.append(parent)
    return chain


def _misfit(image: Image, parent: Image) -> Optional[str]:
    """Why the image's disk cannot lie on its parent's; None when it can."""
    if image.disk_format != "qcow2":
        return f"its format is {image.disk_format}, not qcow2"
    if parent.disk is None:
        return "that has no disk"
    return "that has a larger disk" if parent.virtual_size > image.virtual_size else None


def names_of(chain: Sequence[Image]) -> list[str]:
    """How the copies of a chain's disks are called in a folder: the image's own `image`, then `image-1`, and so on."""
    return ["image", *(f"image-{number}" for number in range(1, len(chain)))]
