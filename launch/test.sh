#!/usr/bin/env bash
# Makes .venv, installs, runs the tests. Arguments go to pytest: bash launch/test.sh -k checkpoint
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "[test]"
export OMP_NUM_THREADS=1
exec python -m pytest -q "$@"
