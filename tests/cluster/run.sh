#!/usr/bin/env bash
# `make test-cluster`: sshd with three nodes, SLURM and Open MPI on this one machine, in namespaces of their own that
# take everything down when they end. Skipped, with the reason, where that cannot be.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
  echo "test-cluster: skipped: $1"
  exit 0
}
[[ $(uname) == Linux ]] || skip "namespaces need Linux"
((EUID == 0)) || skip "only root may start slurmd and sshd"
for program in unshare ip sshd ssh ssh-keygen pdsh munged slurmctld slurmd srun mpirun; do
  PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || skip "$program is not installed (Debian: openssh-server \
pdsh munge slurmctld slurmd slurm-client openmpi-bin util-linux iproute2)"
done
unshare --mount --net --pid --fork true 2> /dev/null || skip "this machine allows no namespaces (unshare)"

exec unshare --mount --net --pid --fork --kill-child --mount-proc \
  "${PYTHON:-.venv/bin/python}" -m pytest -p no:cacheprovider --durations=0 --timeout=900 "${@:-tests/cluster}"
