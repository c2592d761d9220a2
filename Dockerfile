# blt_titan with what running needs. Built by nothing here; hadolint has read it.
#
#   docker build -t blt-titan .                                                    CPU
#   docker build -t blt-titan --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH_INDEX_URL= .    CUDA
#   docker run --rm -it --shm-size=8g [--gpus all] -v "$PWD/data:/work/data" -v "$PWD/outputs:/work/outputs" blt-titan \
#       train debug
#
# BASE is a Debian or Ubuntu with Python 3.11 or 3.12, or one whose apt has it. An empty TORCH_INDEX_URL takes torch from
# PyPI, where Linux gets the build with CUDA in it; the driver is the host's. Loader workers and NCCL need --shm-size.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/blt_titan/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1

# A compiler and Python's headers are for torch.compile. Versions are those of the base's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && if ! command -v python3; then apt-get install -y --no-install-recommends python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/blt_titan
COPY pyproject.toml README.md LICENSE run_train.sh ./
COPY scripts scripts
COPY train_configs train_configs
COPY parallelisms parallelisms
COPY blt_titan blt_titan
RUN PYTHON=python3 PIP_NO_CACHE_DIR=1 scripts/setup.sh demo

WORKDIR /work
ENTRYPOINT ["blt-titan"]
CMD ["--help"]
