# docker build -t clip-lightning .
#   --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04    another base, with Python 3.11.4 or newer in apt
#   --build-arg TORCH_INDEX=URL                             other builds of torch, such as PyTorch's CPU wheels
#   --build-arg EXTRAS=quickstart,app,search,lora           more of README's extras
# docker run --rm --gpus all -v "$PWD:/work" -v clip-cache:/root/.cache clip-lightning \
#   fit --config heads --data.root photos
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG TORCH_INDEX=""
ARG EXTRAS="quickstart,app"
RUN command -v python3 >/dev/null && python3 -c 'import ensurepip' \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*)
COPY . /source
RUN export PIP_NO_CACHE_DIR=1 TORCH_INDEX EXTRAS && /source/docker/install.sh /opt/clip-lightning && rm -rf /source

ENV PATH=/opt/clip-lightning/bin:$PATH
WORKDIR /work
ENTRYPOINT ["clip-lightning"]
CMD ["--help"]
