# Sourced by the scripts: makes and enters the virtual environment in .venv, and installs what is needed where it is not.
#   source environment.sh requirements.txt

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "error: Python 3.10 or newer is needed; set PYTHON to its path (now: $python)" >&2
  exit 2
fi
[ -f .venv/bin/activate ] || "$python" -m venv --clear .venv # activate is what it makes last
source .venv/bin/activate
# pip finds out in a second that nothing is missing, but needs the network for it; so remember what was installed.
if ! cat requirements*.txt | cmp -s - ".venv/installed-$1"; then # one file includes the other
  echo "installing $1 into .venv"
  # pip would compile all files, most of which nobody imports: more than half of its time. Python compiles what it imports, and keeps it,
  # unless it is told not to
  compile=$([ -n "${PYTHONDONTWRITEBYTECODE:-}" ] && echo --compile || echo --no-compile)
  python -m pip install --quiet --disable-pip-version-check "$compile" -r "$1"
  cat requirements*.txt > ".venv/installed-$1"
fi
