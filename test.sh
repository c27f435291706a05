#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest: `./test.sh -m slow`, `./test.sh tests/cli`.
set -eu
cd "$(dirname "$0")"
. scripts/setup.sh
exec python -m pytest "$@"
