#!/usr/bin/env bash
# The tests that carry the numbers, once more as other processors compute: processors.sh PYTHON
# Each line is a kind of processor: name, threads, and the newest instructions that torch, oneDNN and MKL may use;
# last, the types of half the size that DeepSpeed finds. What the processor here lacks, it does without.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1 status=0 options=${PYTEST_ADDOPTS:-}
while read -r name threads torch onednn mkl types; do
  printf '%s: torch %s, oneDNN %s, MKL %s, %d thread(s), DeepSpeed finds %s\n' \
    "$name" "$torch" "$onednn" "$mkl" "$threads" "$types"
  OMP_NUM_THREADS=$threads ATEN_CPU_CAPABILITY=$torch ONEDNN_MAX_CPU_ISA=$onednn MKL_CBWR=$mkl \
    YUAN2_TEST_ACCELERATOR=$types PYTEST_ADDOPTS="${options/.xml/-$name.xml}" \
    "$python" -m pytest tests/unit/model tests/golden/test_yuan2_tiny.py tests/integration/trainer \
    -m numbers -q -n $((3 - threads)) --dist loadfile || status=$?
done <<'END'
sse4 1 default SSE41 COMPATIBLE bf16
avx2 2 avx2 AVX2 AVX2 fp16,bf16
avx512 1 avx512 AVX512_CORE AVX512 bf16
END
exit $status
