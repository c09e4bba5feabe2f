# docker build -t gdetkd .
# docker run --rm -v "$PWD:/work" gdetkd demo --output runs/demo
#
# On NVIDIA GPUs: docker run --rm --gpus all --ipc host -v "$PWD:/work" gdetkd distill my.yaml
# torch's CPU build is a fraction of the size; its index is named on pytorch.org: --build-arg TORCH_INDEX=URL
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH_INDEX
ARG EXTRAS=transformers,timm

COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} \
        torch torchvision \
    && pip install --no-cache-dir --constraint /src/constraints.txt "/src[${EXTRAS}]" \
    && rm -r /src
WORKDIR /work
ENTRYPOINT ["gdetkd"]
