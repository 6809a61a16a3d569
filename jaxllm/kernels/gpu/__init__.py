"""Kernels for NVIDIA GPUs, which Pallas compiles with Triton. Set JAXLLM_GPU_KERNELS to 0 to do without them."""

import os
from typing import Any


def runs(device: Any) -> bool:
    """Whether the kernels are to run on a device: of those that they can, from Ampere on."""
    if os.environ.get("JAXLLM_GPU_KERNELS") == "0" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8
