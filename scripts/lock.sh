#!/usr/bin/env bash
# Resolve requirements/*.in for Linux and every Python from 3.10 on: a package whose newest version has left a Python
# behind is locked at several versions, each with its marker. The images and the light environment are held to
# the versions of dev.txt, which is what the tests ran with. What is locked stays where it still fits: `lock.sh --upgrade` takes the newest of everything.
set -euo pipefail
cache=${YUAN2_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/yuan2}
export UV_CACHE_DIR=$cache/uv
upgrade=("$@")
cd "$(dirname "$0")/.."
uv=$(scripts/uv.sh python3)
compile() {
  local lock=${*: -1}
  "$uv" pip compile -q --generate-hashes --no-annotate --no-header --no-emit-index-url "${upgrade[@]}" "$@"
  # What every line would say, from `environments` in pyproject.toml, is left out: only Pythons are told apart.
  sed -i -E "s/ and \(\(platform_machine == 'aarch64'.*\)\) / /; s/( and| ;) python_full_version < '3\.15'//" "$lock"
}
compile --universal --python-version 3.10 requirements/dev.in -o requirements/dev.txt
for image in train serve operator light; do
  compile --universal --python-version 3.10 requirements/$image.in -c requirements/dev.txt -o requirements/$image.txt
done
compile --python-version 3.10 requirements/compat.in -o requirements/compat.txt
compile --universal --python-version 3.10 requirements/mutation.in -c requirements/dev.txt -o requirements/mutation.txt
compile --python-version 3.11 requirements/vllm.in --override requirements/vllm-overrides.txt -o requirements/vllm.txt
compile --python-version 3.10 requirements/fastchat.in -o requirements/fastchat.txt
