#!/bin/sh
# Installs clip-lightning into a new environment: docker/install.sh FOLDER [PACKAGE]
# PACKAGE is a wheel, by default this checkout. The Dockerfile and `make wheel` run this script.
#   PYTHON       the interpreter, by default python3
#   TORCH_INDEX  an index with other builds of torch, such as PyTorch's CPU wheels
#   EXTRAS       by default quickstart,app
set -eu
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=$1
package=${2:-$checkout}

"${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip install -qq --constraint "$checkout/constraints.txt" "$@"; }
if [ -n "${TORCH_INDEX:-}" ]; then
  pip --index-url "$TORCH_INDEX" torch torchvision
fi
pip "$package[${EXTRAS:-quickstart,app}]"
"$folder/bin/clip-lightning" env
