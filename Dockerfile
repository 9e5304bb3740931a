# The two commands of the README in a container; CPU:
#   docker build -t shodh . && docker run --rm -v "$PWD/runs:/shodh/runs" shodh            make demo
#   docker run --rm shodh make test
# A smaller image without CUDA's libraries: --build-arg TORCH_INDEX=<an index of CPU builds of torch>.
# CUDA: an image with nvcc, and the card to compile kernels for (90: H100):
#   docker build -t shodh:cuda --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg CUDA_ARCHS=90 .
#   docker run --rm --gpus all --ipc=host shodh:cuda
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TORCH_INDEX=
ARG CUDA_ARCHS=
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX} SHODH_CUDA_ARCHS=${CUDA_ARCHS} DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ git make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /shodh
COPY . .
RUN make install
CMD ["make", "demo"]
