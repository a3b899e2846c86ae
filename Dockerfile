# syntax=docker/dockerfile:1
# trainrt in an image: TensorFlow with CUDA, the kernels built ahead, TensorBoard.
#
#   docker build -t trainrt .                                                                       GPU
#   docker build -t trainrt:cpu --build-arg BASE=ubuntu:22.04 --build-arg EXTRA= .                  CPU
#   docker run --rm --gpus all trainrt                                                              trainrt doctor
#   docker run --rm --gpus all -v "$PWD:/work" trainrt python train.py                              train
#   docker run --rm -p 6006:6006 -v "$PWD/runs:/work" trainrt tensorboard --bind_all --logdir .     look
#
# The base brings the driver's hooks; CUDA's libraries come with TensorFlow, in the versions that it was built with. With
# --build-arg BASE=nvidia/cuda:12.5.1-devel-ubuntu22.04 there is nvcc too, and the first run builds the GPU kernels.
ARG BASE=nvidia/cuda:12.5.1-base-ubuntu22.04

FROM ${BASE} AS build
ARG EXTRA=[gpu]
# The processors that the kernels are built for: a machine takes the best that it has.
ARG TARGETS="x86-64-v3 x86-64"
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /src/
COPY trainrt /src/trainrt
COPY kernels /src/kernels
RUN python3 -m venv /opt/trainrt/venv
RUN /opt/trainrt/venv/bin/pip install --no-cache-dir "/src${EXTRA}"
RUN for target in ${TARGETS}; do \
      /opt/trainrt/venv/bin/trainrt kernels build --target "${target}" --directory /opt/trainrt/kernels; \
    done

FROM ${BASE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 trainrt \
    && install -d -o trainrt -g trainrt /work
COPY --from=build /opt/trainrt /opt/trainrt
ENV PATH=/opt/trainrt/venv/bin:${PATH} \
    TRAINRT_KERNELS=/opt/trainrt/kernels \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER trainrt
WORKDIR /work
# TensorBoard
EXPOSE 6006
CMD ["trainrt", "doctor"]
