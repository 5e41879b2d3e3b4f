#!/usr/bin/env bash
# Resolve requirements/*.in. Every image is held to the versions of dev.txt, which is what the tests ran with.
set -euo pipefail
cache=${YUAN2_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/yuan2}
cd "$(dirname "$0")/../requirements"
compile() {
  "$cache/uv-tool/bin/uv" pip compile -q --generate-hashes --no-annotate --no-header --no-emit-index-url "$@"
}
compile --python-version 3.11 dev.in -o dev.txt
for image in train serve operator; do
  compile --python-version 3.11 "$image.in" -c dev.txt -o "$image.txt"
done
compile --python-version 3.10 compat.in -o compat.txt
