#!/usr/bin/env bash
# Profiles of a sparse and a dense training on the GPU; see gpu_all.py.   bash tools/bench/gpu_profile.sh OUT [--tiny]
exec bash "$(dirname "$0")/gpu_all.sh" "$@" --profile
