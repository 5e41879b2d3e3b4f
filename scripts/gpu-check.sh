#!/usr/bin/env bash
# What only a GPU can show, on this machine's GPU, with figures: tests/gpu.
# gpu-check.sh PYTHON           run it with a Python that has torch, transformers and safetensors
# gpu-check.sh PYTHON --bundle  pack build/gpu-check.tar.gz with all that it needs beside those, for a machine that has
#                               nothing else: unpack it there and run `./gpu-check.sh python3`
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
[ -d ../tests/gpu ] && cd ..
python=$1
packages=(annotated_types iniconfig pluggy pydantic pydantic_core pygments pytest _pytest sentencepiece sentencepiece.libs typing_extensions.py typing_inspection)

if [ "${2-}" = --bundle ]; then
  out=build/gpu-check
  rm -rf "$out" && mkdir -p "$out/tests" "$out/site"
  cp -r core "$out/core" && cp -r tests/gpu "$out/tests/gpu" && cp scripts/gpu-check.sh "$out/"
  from=$("$python" -c 'import pydantic, pathlib; print(pathlib.Path(pydantic.__file__).parents[1])')
  for package in "${packages[@]}"; do cp -r "$from/$package" "$out/site/"; done
  cp -r "$from"/{pytest,pydantic,pydantic_core,sentencepiece}-*.dist-info "$out/site/"
  find "$out" -name __pycache__ -prune -exec rm -rf {} +
  "$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' > "$out/python-version"
  tar -C build -czf build/gpu-check.tar.gz gpu-check
  echo "build/gpu-check.tar.gz: $(du -k build/gpu-check.tar.gz | cut -f1) KB, for Python $(cat "$out/python-version")"
  exit
fi

path=$PWD/core
if [ -f python-version ]; then
  wanted=$(cat python-version)
  "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$wanted')" ||
    { echo "this bundle is for Python $wanted; make one with a Python of this machine's version" >&2; exit 1; }
  path=$path:$PWD/site
fi
printf '[pytest]\nmarkers = gpu: needs a GPU\n' > "${TMPDIR:-/tmp}/gpu-check-$$.ini"
trap 'rm -f "${TMPDIR:-/tmp}/gpu-check-$$.ini"' EXIT
PYTHONPATH=$path PYTHONDONTWRITEBYTECODE=1 "$python" -m pytest -c "${TMPDIR:-/tmp}/gpu-check-$$.ini" --rootdir "$PWD" \
  -p no:cacheprovider --noconftest --import-mode=importlib -q -rs tests/gpu
