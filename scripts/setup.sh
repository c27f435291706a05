# Sourced by demo.sh and test.sh: makes the virtual environment once, and activates it.
# RNGDC_VENV names another directory for it, PYTHON another interpreter.
venv=${RNGDC_VENV:-$PWD/.venv}
python=${PYTHON:-python3}
"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit(f"rngdc needs Python 3.11 or newer, this is {sys.version.split()[0]}; set PYTHON to another one")
PY
# The stamp says which requirements the environment was made for.
stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$venv/rngdc-stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "Installing rngdc into $venv (once; torch makes it a large download)" >&2
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
    echo "$stamp" > "$venv/rngdc-stamp"
fi
. "$venv/bin/activate"
