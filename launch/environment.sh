# Sourced by quickstart.sh and test.sh: makes .venv beside setup.py once, installs, and puts it on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_environment() { # make_environment EXTRA: "" or "[test]"
  local python stamp
  if [ ! -x .venv/bin/python ] || [ ! -x .venv/bin/pip ]; then
    for python in python3 python3.12 python3.11 python3.10 ""; do
      [ -n "$python" ] || { echo "no Python 3.10 to 3.12 on the PATH: install one (Debian: apt-get install python3 python3-venv)" >&2; exit 2; }
      "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break
    done
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv || { echo "$python cannot make a virtual environment: install its venv module (Debian: apt-get install python3-venv)" >&2; exit 2; }
  fi
  stamp=".venv/installed$1-$(cksum < setup.py | tr -d ' ')"
  if [ ! -e "$stamp" ]; then
    echo "installing (a few minutes the first time)"
    # torch first and pinned: left to the ranges of other packages, pip takes its newest build
    .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/pip install --quiet torch==2.13.0
    .venv/bin/pip install --quiet --editable ".$1"
    touch "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
  # a private folder: a build that was killed elsewhere leaves a lock that later starts would wait for
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
  export TOKENIZERS_PARALLELISM=false
}
