"""Kernels for NVIDIA GPUs, which Pallas compiles with Triton."""

from typing import Any


def runs(device: Any) -> bool:
    """Whether the kernels run on a device: from Ampere on, as tensor cores take bfloat16."""
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
