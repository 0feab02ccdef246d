"""Processors that ship. Each is an ``ArrayProcessor``; their names here are what ``--processor`` takes."""

from __future__ import annotations

SHIPPED = {
    "green_tint": "gpu_byoc.processors.green_tint:GreenTint",
    "grayscale": "gpu_byoc.processors.grayscale:Grayscale",
    "passthrough": "gpu_byoc.processors.passthrough:Passthrough",
}
