# Source this file: it sets PYTHON to an interpreter that has the project's packages.
#
# A named interpreter (PYTHON=/path/to/python bash two_stage/lcron.sh) or an active environment wins and is only checked.
# Otherwise .venv is made in the project's folder, once, from requirements.txt; REQUIREMENTS names another file.

if [ -z "${BASH_VERSION:-}" ]; then
    echo "error: setup.sh is written for bash; run: bash setup.sh" >&2
    return 2 2>/dev/null || exit 2
fi
_project=$(realpath -- "${BASH_SOURCE[0]}")
_project=${_project%/*}
_requirements=$_project/${REQUIREMENTS:-requirements.txt}

# The current folder may be that of a log, whose files are not to be executed: Python would import from it, and takes an
# empty or relative entry of PYTHONPATH for it.
export PYTHONSAFEPATH=1
IFS=: read -r -a _entries <<<"${PYTHONPATH:-}"
PYTHONPATH=$_project
for _entry in "${_entries[@]-}"; do
    case $_entry in "$_project") ;; /*) PYTHONPATH+=:$_entry ;; esac
done
export PYTHONPATH

_say() { printf '%s\n' "$*" >&2; }

_check_packages() { # interpreter
    "$1" - "$_requirements" <<'PY'
import sys

if sys.version_info < (3, 11):
    sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}; the project needs 3.11 or later")

import importlib.metadata, pathlib # not before: earlier versions import from the current folder

def names(path):
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            yield from names(path.parent / line[3:].strip())
        elif line.strip() and not line.startswith("#"):
            yield line.strip()

def version(name):
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None

path = pathlib.Path(sys.argv[1])
pins = dict(pin.split("==") for pin in names(path))
absent = [name for name in pins if version(name) is None]
other = [f"{name} {version(name)} (pinned: {pin})" for name, pin in pins.items() if version(name) not in (None, pin)]
if other:
    print(f"note: {sys.executable} has {', '.join(other)}", file=sys.stderr)
if absent:
    sys.exit(f"error: {sys.executable} lacks {', '.join(absent)}; run: {sys.executable} -m pip install -r '{path}'")
PY
}

_find_python() {
    local candidate
    for candidate in python3.11 python3 python; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    _say "error: no Python 3.11 or later on the PATH; install one, or name it: PYTHON=/path/to/python"
    return 2
}

_make_venv() { # folder
    local base key stamp lock=$1.lock
    base=$(_find_python) || return
    # The stamp names what was installed; it is written last, so an interrupted installation is taken up again.
    key=$(cat "$_project"/requirements*.txt | cksum | tr -d ' ')
    stamp=$1/.installed-${_requirements##*/}-$key
    [ -e "$stamp" ] && return
    exec 9>"$lock"
    if command -v flock >/dev/null; then flock 9; fi # a second script started meanwhile waits here
    if [ ! -e "$stamp" ]; then
        _say "Installing the packages of ${_requirements##*/} into $1 (once; a few minutes)"
        if ! "$1/bin/python" -c '' 2>/dev/null; then
            "$base" -m venv "$1" >/dev/null 2>&1 || "$base" -m venv --clear --without-pip "$1" || return
        fi
        find "$1" -maxdepth 1 -name '.installed-*' ! -name "*-$key" -delete # of other pins, which are replaced now
        if "$1/bin/python" -m pip --version >/dev/null 2>&1; then
            "$1/bin/python" -m pip install --quiet --disable-pip-version-check -r "$_requirements" || return
        else # a Python without ensurepip: its own pip installs into the new environment
            "$base" -m pip --python "$1/bin/python" install --quiet --disable-pip-version-check -r "$_requirements" || return
        fi
        : >"$stamp"
    fi
    exec 9>&-
}

if [ -z "${PYTHON:-}" ] && [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    PYTHON=${VIRTUAL_ENV:-$CONDA_PREFIX}/bin/python
fi
case ${PYTHON:-} in
    /* | '') ;;
    */*) PYTHON=$PWD/$PYTHON ;; # the caller may change folders
esac
if [ -n "${PYTHON:-}" ]; then
    if ! command -v -- "$PYTHON" >/dev/null; then
        _say "error: $PYTHON: no such program; name a Python 3.11 or later with PYTHON=/path/to/python"
        exit 2
    fi
    _check_packages "$PYTHON" || exit 2
else
    _make_venv "$_project/.venv" || exit 2
    PYTHON=$_project/.venv/bin/python
fi
export PYTHON
