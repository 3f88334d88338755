# rlaif with vLLM for NVIDIA GPUs.
#   docker build -t rlaif-gpu -f docker/gpu.Dockerfile .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" rlaif-gpu doctor
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc and Python's headers, because Triton compiles kernels at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH="/opt/venv/bin:$PATH"
WORKDIR /opt/rlaif
COPY . .
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir '.[gpu,train,review,checks]' \
    && useradd --create-home --uid 1001 rlaif \
    && mkdir /work \
    && chown rlaif /work

USER 1001
WORKDIR /work
EXPOSE 7543
ENTRYPOINT ["rlaif"]
CMD ["--help"]
