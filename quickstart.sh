#!/usr/bin/env bash
# Everything from nothing, on a machine with Python 3.11 or newer:
#   bash quickstart.sh          train the embedded editor on the embedded data, with a before/after report
#   bash quickstart.sh test     run every check and test
#   bash quickstart.sh docs     build the documentation's site into site/; open site/index.html
# Further arguments go to `rcgrpo train`, to pytest or to `mkdocs build`. Makes the virtual environment .venv beside this file.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
job=train
case "${1:-}" in train | test | docs) job=$1; shift ;; esac

python=""
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || { echo "quickstart: found no Python 3.11 or newer; install python3" >&2; exit 1; }

venv=$here/.venv
if [ ! -x "$venv/bin/pip" ]; then
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        # Debian keeps the module that makes virtual environments in a package of its own.
        echo "quickstart: this Python cannot make virtual environments yet; installing python3-venv"
        sudo=""; [ "$(id -u)" = 0 ] || sudo=sudo
        { $sudo apt-get update -qq && $sudo apt-get install -qq -y python3-venv; } ||
            { echo "quickstart: please install python3-venv and run this again" >&2; exit 1; }
    fi
    "$python" -m venv "$venv"
fi

case $job in test) extras=dev ;; docs) extras=docs ;; *) extras=tiny ;; esac
echo "quickstart: installing rcgrpo[$extras] and what it needs into $venv"
echo "            (the first time about 5 GB, most of it PyTorch: a few minutes; docs/installing.md: less without a GPU)"
"$venv/bin/pip" install --disable-pip-version-check --progress-bar off -e "$here[$extras]" |
    awk '/^ *(Downloading|Using cached|Installing) / {print "  " substr($0, 1, 100); fflush()}'

build_site() { NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --quiet --strict "$@"; }
if [ "$job" = docs ]; then
    cd "$here"
    build_site "$@"
    echo "quickstart: open $here/site/index.html"
    exit
fi
if [ "$job" = test ]; then
    cd "$here"
    "$venv/bin/ruff" check .
    "$venv/bin/ruff" format --check .
    "$venv/bin/mypy"
    build_site
    # Two workers with a thread each: the suite fits two cores and 6 GB whatever the machine has.
    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 exec "$venv/bin/python" -m pytest -n 2 "$@"
fi
echo "quickstart: training starts. A first picture in half a minute, from another terminal: $venv/bin/rcgrpo edit"
exec "$venv/bin/rcgrpo" train "$@"
