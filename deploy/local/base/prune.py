"""Make the installed torch small for CPUs: without what a CPU process never opens, and without GPU code.

torch from PyPI links against the CUDA libraries, so those must stay. These are opened by name at the first
use of a GPU feature and never before: cuDNN's engines (behind the small libcudnn.so.9), torch's linear
algebra on GPUs with cuSOLVER and the linker that it uses, NVSHMEM's transports, profilers, Triton.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from gpu_code import drop_section

GPU_ONLY = (
    "nvidia/cudnn/lib/libcudnn_*.so.*",
    "nvidia/nvshmem/lib/nvshmem_*.so.*",
    "nvidia/*/lib/libcusolver*.so.*",
    "nvidia/*/lib/libnvJitLink.so.*",
    "nvidia/*/lib/libnvblas.so.*",
    "nvidia/*/lib/libnvperf_*",
    "nvidia/*/lib/*.alt.so.*",
    "nvidia/*/lib/*.a",
    "nvidia/*/lib/*.bc",
    "nvidia/*/include",
    "nvidia/*/cccl",
    "torch/lib/libtorch_cuda_linalg.so",
    "triton",
    "torch/test",
    "torch/lib/*.a",
    "torch/bin/*test*",
)


def prune(site: Path) -> int:
    """Remove every match below `site`, and the GPU code of what stays; returns the bytes freed."""
    freed = 0
    for pattern in GPU_ONLY:
        for path in site.glob(pattern):
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            freed += sum(file.lstat().st_size for file in files)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    libraries = [path for path in site.rglob("*.so*") if path.is_file() and not path.is_symlink()]
    return freed + sum(drop_section(path) for path in libraries)


if __name__ == "__main__":
    print(f"pruned {prune(Path(sysconfig.get_paths()['purelib'])) / 1e6:.0f} MB")
