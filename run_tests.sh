#!/usr/bin/env bash
# From a fresh checkout to a tested one: makes .venv, installs the test requirements, runs all tests, two at a time on one thread each.
# Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

unset PYTHONDONTWRITEBYTECODE  # of the many processes that tests start only the first compiles what they import
source environment.sh requirements-test.txt
# tests/test_wires.py compares with badcrossbar, whose plots, unused here, need cairo's headers: installed without them
python -c 'import badcrossbar' 2>/dev/null ||
  python -m pip install --quiet --disable-pip-version-check --no-deps badcrossbar pathvalidate ||
  echo "badcrossbar could not be installed: the tests that compare with it are skipped" >&2
# worksteal gives each process tests that stand together, so that they do not both compile the same kernels
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist worksteal "$@"
