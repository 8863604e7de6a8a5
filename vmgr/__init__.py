"""vTorque: configuration, images, guests and everything that happens on a node."""

from __future__ import annotations

__version__ = "0.1.0"
