"""What GPUs can do at most, as their vendor states it. Lightning has such a table, but there H200 counts sparse products and an L40S is an L4."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """TFLOP/s of dense matrix products that are summed in float32."""

    half: float  # bfloat16 and float16
    tf32: float
    fp32: float


# By the whole name that CUDA reports, without "NVIDIA ": a slice of a GPU (MIG) or a laptop's GPU of the same name is another one.
# From the data sheets and architecture white papers; where those count structured sparsity, half of what they say.
PEAKS = {
    r"GB200": Peak(2500, 1250, 80),
    r"B200": Peak(2250, 1100, 75),
    r"H100 80GB HBM3|H200|GH200 \w+( HBM3e)?": Peak(989.4, 494.7, 66.9),
    r"H100 NVL|H200 NVL": Peak(835.5, 417.5, 60),
    r"H100 PCIe": Peak(756, 378, 51.2),
    r"A100(-SXM4?-|-PCIE-)(40|80)GB|A100 80GB PCIe": Peak(312, 156, 19.5),
    r"A40": Peak(149.7, 74.8, 37.4),
    r"A30": Peak(165, 82, 10.3),
    r"A10": Peak(125, 62.5, 31.2),
    r"L40S": Peak(362, 183, 91.6),
    r"L40": Peak(181, 90.5, 90.5),
    r"L4": Peak(121, 60, 30.3),
    r"RTX 6000 Ada Generation": Peak(364.2, 182.1, 91.1),
    r"RTX A6000": Peak(154.8, 77.4, 38.7),
    r"GeForce RTX 5090": Peak(209.5, 104.8, 104.8),
    r"GeForce RTX 4090": Peak(165.2, 82.6, 82.6),
    r"GeForce RTX 3090": Peak(71, 35.6, 35.6),
}


def peak_flops(gpu: str, precision: str) -> float | None:
    """FLOP/s at most of a GPU (torch.cuda.get_device_name) in a Lightning precision; None: not known.

    float32 products are tf32 where torch is set so (`torch.set_float32_matmul_precision`).
    """
    peak = next((peak for name, peak in PEAKS.items() if re.fullmatch(name, gpu.removeprefix("NVIDIA "))), None)
    if peak is None:
        return None
    if precision.startswith(("bf16", "16")):
        return 1e12 * peak.half
    if precision.startswith("32"):
        return 1e12 * (peak.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else peak.fp32)
    return None
