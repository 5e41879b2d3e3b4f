#!/usr/bin/env bash
# What `make test` and CI run, in the order that fails soonest. Each stage says how long it took; all stages run,
# so that one failure does not hide another, and the exit code is that of the first that failed. At the end stands
# where the time went; build/test has it in files.
set -uo pipefail
cd "$(dirname "$0")/.."
failed=() status=0 results=build/test
rm -rf "$results" && mkdir -p "$results"
stage() {
  local name=$1 started=$SECONDS code=0 result=ok
  shift
  printf '\n== %s\n' "$name"
  PYTEST_ADDOPTS="${PYTEST_ADDOPTS:-} --junitxml=$results/$name.xml" "$@" || code=$?
  [ $code = 0 ] || result=FAILED
  printf '== %s: %s in %d s\n' "$name" $result $((SECONDS - started))
  printf '%s\t%s\t%d\n' "$name" $result $((SECONDS - started)) >>"$results/stages.tsv"
  if [ $code != 0 ]; then failed+=("$name"); [ $status != 0 ] || status=$code; fi
}
stage venv make --no-print-directory venv
[ $status = 0 ] || exit $status
stage lint make --no-print-directory lint
stage unit make --no-print-directory unit
if scripts/find-python.sh 3.10 >/dev/null 2>&1; then
  stage compat make --no-print-directory compat
elif [ "${CI:-}" = true ]; then
  stage compat false
else
  echo "skipped: the suite on Python 3.10 and torch 2.1.2, no Python 3.10 to be had"
fi
stage vllm make --no-print-directory vllm
stage vllm-worker make --no-print-directory vllm-worker
# Ahead of the tests that use them: their time-outs are not meant for a first build. Without Go those tests say so.
if command -v go >/dev/null || [ -x /usr/local/go/bin/go ]; then stage build make --no-print-directory build; fi
stage integration make --no-print-directory integration
stage processors make --no-print-directory processors
stage e2e make --no-print-directory e2e
stage lifecycle make --no-print-directory lifecycle
printf '\n' && "${PYTHON:-python3}" scripts/durations.py "$results"
if [ ${#failed[@]} = 0 ]; then echo "test: all stages passed in $SECONDS s"; else echo "test: FAILED: ${failed[*]}"; fi
exit $status
