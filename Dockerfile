# rlaif with the CPU build of vLLM. GPUs: docker/gpu.Dockerfile.
#   docker build -t rlaif .
#   docker run --rm -v "$PWD:/work" rlaif init my-run
FROM python:3.11-slim-bookworm

# libnuma1: vLLM's CPU kernels load it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rlaif
COPY . .
# uv, because only uv reads [tool.uv] in pyproject.toml: the CPU builds of torch and vLLM.
# --compile-bytecode, because an image is read-only and each start would compile torch and vLLM again.
RUN pip install --no-cache-dir 'uv>=0.9,<1' \
    && uv pip install --system --no-cache --compile-bytecode '.[cpu,train,review,checks]' \
    && useradd --create-home --uid 1000 rlaif \
    && mkdir /work \
    && chown rlaif /work

USER 1000
WORKDIR /work
EXPOSE 7543
ENTRYPOINT ["rlaif"]
CMD ["--help"]
