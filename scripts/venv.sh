#!/usr/bin/env bash
# Make a virtual environment from a lock file: venv.sh DIRECTORY LOCK PYTHON [PROJECT to install as it stands]
# A .ok file inside tells that it is whole; an interrupted run leaves none and starts over.
set -euo pipefail
directory=$1 lock=$2 python=$3 project=${4:-}
cache=${YUAN2_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/yuan2}

command -v "$python" >/dev/null || { echo "venv: $python is not installed" >&2; exit 1; }
uv=$(scripts/uv.sh "$python")
started=$SECONDS
rm -rf "$directory"
export UV_CACHE_DIR=$cache/uv
"$uv" venv -q --python "$(command -v "$python")" "$directory"
# A lock file is complete, and may override what a package asks for (requirements/vllm-overrides.txt).
"$uv" pip install -q --compile-bytecode --python "$directory/bin/python" --no-deps --require-hashes -r "$lock"
if [ -n "$project" ]; then # for its entry points
  "$uv" pip install -q --python "$directory/bin/python" --no-deps --no-build-isolation --editable "$project"
fi
# The packages of this repository are used from where they stand.
site=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for folder in core operator trainer_image server_image deploy/local deploy/demo; do
  echo "$PWD/$folder"
done >"$site/yuan2.pth"
touch "$directory/.ok"
echo "venv: $directory in $((SECONDS - started)) s"
