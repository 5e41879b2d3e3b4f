"""GPUs that the estimate knows: what their data sheets say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_MIB: Final = 1 << 20
_PCIE_4: Final = 31.5e9
"""Bytes a second in each direction of 16 lanes of PCIe 4.0 (16 GT/s, 128b/130b)."""
_PCIE_5: Final = 63.0e9


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node whose GPUs are all alike.

    Attributes:
        name: as people say it.
        memory_bytes: memory that the driver reports (ECC on, where it has ECC).
        bf16_flops: dense bf16 matrix products with fp32 accumulation, FLOP/s (data sheet, without sparsity).
        memory_bandwidth: bytes a second (data sheet).
        link_bandwidth: bytes a second in one direction between GPUs of a node (NVLink, else PCIe).
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    memory_bandwidth: float
    link_bandwidth: float


def _gpu(name: str, mib: int, teraflops: float, bandwidth: float, link: float) -> Gpu:
    return Gpu(name, mib * _MIB, teraflops * 1e12, bandwidth * 1e9, link)


_TABLE: Final = (
    _gpu("L20", 46068, 119.5, 864, _PCIE_4),
    _gpu("L40", 46068, 181.05, 864, _PCIE_4),
    _gpu("L40S", 46068, 362.05, 864, _PCIE_4),
    _gpu("A10", 23028, 125, 600, _PCIE_4),
    _gpu("RTX 4090", 24564, 165.2, 1008, _PCIE_4),
    _gpu("A100-40", 40960, 312, 1555, 300e9),
    _gpu("A100-80", 81920, 312, 2039, 300e9),
    _gpu("A100-80 PCIe", 81920, 312, 1935, _PCIE_4),
    _gpu("A800", 81920, 312, 2039, 200e9),
    _gpu("A800 PCIe", 81920, 312, 1935, _PCIE_4),
    _gpu("H100", 81559, 989.4, 3350, 450e9),
    _gpu("H100 PCIe", 81559, 756, 2039, _PCIE_5),
    _gpu("H800", 81559, 989.4, 3350, 200e9),
    _gpu("H200", 143771, 989.4, 4800, 450e9),
    _gpu("H20", 97871, 148, 4000, 450e9),
)

GPUS: Final[Mapping[str, Gpu]] = {gpu.name: gpu for gpu in _TABLE}
"""By name. GPUs without bf16 (V100, T4) are absent: nothing of ours trains on them."""

_LABELS: Final[Mapping[str, str]] = {
    "a100 sxm4 40gb": "A100-40",
    "a100 sxm4 80gb": "A100-80",
    "a100 80gb pcie": "A100-80 PCIe",
    "a100 pcie 80gb": "A100-80 PCIe",
    "a800 sxm4 80gb": "A800",
    "a800 80gb pcie": "A800 PCIe",
    "h100 80gb hbm3": "H100",
    "h100 sxm5 80gb": "H100",
    "h800 80gb hbm3": "H800",
}
"""What NVIDIA's GPU feature discovery writes into the node label `nvidia.com/gpu.product` where it is not the
name."""
_NAMES: Final[Mapping[str, str]] = {re.sub(r"[^a-z0-9]+", " ", name.lower()): name for name in GPUS}


def find_gpu(product: str) -> Gpu | None:
    """The GPU of a name or of a node label `nvidia.com/gpu.product`; None when it is not known.

    Labels of shared GPUs and of MIG slices are unknown on purpose: a share is not the GPU.
    """
    words = re.sub(r"[^a-z0-9]+", " ", product.lower()).strip()
    words = re.sub(r"\b(nvidia|geforce|tesla) ", "", words)
    name = _LABELS.get(words) or _NAMES.get(words)
    return GPUS[name] if name else None
