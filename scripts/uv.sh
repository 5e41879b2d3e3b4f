#!/usr/bin/env bash
# Print the path of the uv in the cache, which is put there with the given Python when it is missing: uv.sh PYTHON
set -euo pipefail
python=$1
cache=${YUAN2_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/yuan2}
uv=$cache/uv-tool/bin/uv
if ! [ -x "$uv" ]; then
  "$python" -m venv "$cache/uv-tool" 2>/dev/null || {
    [ "$(id -u)" = 0 ] || { echo "venv: install the package python3-venv" >&2; exit 1; }
    { apt-get update -qq && apt-get install -y -qq python3-venv; } >/dev/null
    "$python" -m venv --clear "$cache/uv-tool"
  }
  "$cache/uv-tool/bin/pip" install -q "uv>=0.9" >&2
fi
echo "$uv"
