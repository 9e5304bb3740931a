# The two commands of the README in a container, and the launchers of a cluster; CPU:
#   docker build -t shodh . && docker run --rm -v "$PWD/runs:/shodh/runs" shodh            make demo
#   docker run --rm shodh make test
# A smaller image: --build-arg LAUNCHERS= leaves out ssh, pdsh, MPI and SLURM; --build-arg TORCH_INDEX=<an index of CPU
# builds of torch> leaves out CUDA's libraries.
# CUDA: an image with nvcc, and the card to compile kernels for (90: H100):
#   docker build -t shodh:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg CUDA_ARCHS=90 .
#   docker run --rm --gpus all --ipc=host --network=host shodh:cuda
# Nodes: docs/cluster.md.
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TORCH_INDEX=
ARG CUDA_ARCHS=
ARG LAUNCHERS="openssh-client openssh-server pdsh openmpi-bin slurm-client"
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} SHODH_CUDA_ARCHS=${CUDA_ARCHS} DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ git make ${LAUNCHERS} \
 && mkdir -p /run/sshd \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /shodh
COPY . .
RUN make install
ENV PATH=/shodh/.venv/bin:${PATH} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
CMD ["make", "demo"]
