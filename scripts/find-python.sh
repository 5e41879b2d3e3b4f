#!/usr/bin/env bash
# Print the path of a Python. `find-python.sh 3.10`: one of that version, from PATH or pyenv or else fetched by uv.
# `find-python.sh 3.11 python3`: the named one where it is at least of that version, else as above.
set -euo pipefail
version=$1 preferred=${2:-}
new_enough="import sys; sys.exit(sys.version_info < tuple(map(int, '$version'.split('.'))))"
if [ -n "$preferred" ] && "$preferred" -c "$new_enough" 2>/dev/null; then command -v "$preferred"; exit; fi
if "python$version" --version >/dev/null 2>&1; then command -v "python$version"; exit; fi
if command -v pyenv >/dev/null; then
  found=$(pyenv versions --bare 2>/dev/null | grep "^${version/./\\.}\." | tail -n 1 || true)
  if [ -n "$found" ]; then echo "$(pyenv root)/versions/$found/bin/python$version"; exit; fi
fi
uv=$("$(dirname "$0")/uv.sh" "${preferred:-python3}")
if "$uv" python install -q "$version" >&2 && "$uv" python find --managed-python "$version"; then exit; fi
echo "venv: no Python $version here, and uv could not fetch one; install it, or name one: make venv PYTHON=PATH" >&2
exit 1
