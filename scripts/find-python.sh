#!/usr/bin/env bash
# Print the path of a Python of the wanted version, from PATH or pyenv or else fetched by uv: find-python.sh 3.10
set -euo pipefail
version=$1
cache=${YUAN2_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/yuan2}
if "python$version" --version >/dev/null 2>&1; then command -v "python$version"; exit; fi
if command -v pyenv >/dev/null; then
  found=$(pyenv versions --bare 2>/dev/null | grep "^${version/./\\.}\." | tail -n 1 || true)
  if [ -n "$found" ]; then echo "$(pyenv root)/versions/$found/bin/python$version"; exit; fi
fi
uv=$cache/uv-tool/bin/uv
"$uv" python install -q "$version" >&2 && "$uv" python find --managed-python "$version"
