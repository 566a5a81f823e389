# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

# All commands, with PyTorch for the CPU:
#
#     docker build -t trl-diffusion .
#     docker run -v trl-diffusion:/results trl-diffusion                          the quickstart
#     docker run -v trl-diffusion:/results trl-diffusion instance-dpo --help      any other command
#
# With CUDA:
#
#     docker build --build-arg TORCH_INDEX= -t trl-diffusion .
#     docker run --gpus all -v trl-diffusion:/results trl-diffusion

FROM debian:12-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --no-create-home --home-dir /results --uid 1000 user \
    && install -d -o user -g user /results
ENV PATH=/opt/venv/bin:$PATH

# Three layers, the largest and most lasting first: PyTorch, the other dependencies, this package. The second one installs
# an empty package, so that a change of the code leaves it as it is.
WORKDIR /opt/source
COPY constraints.txt ./
ARG TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
RUN pip install --no-cache-dir --no-deps $TORCH_INDEX -c constraints.txt torch

COPY pyproject.toml setup.py ./
RUN mkdir trl_diffusion \
    && touch trl_diffusion/__init__.py README.md LICENSE \
    && pip install --no-cache-dir -c constraints.txt ".[evaluation]" \
    && rm -r README.md LICENSE build *.egg-info

COPY README.md LICENSE ./
COPY trl_diffusion trl_diffusion
RUN pip install --no-cache-dir --no-deps --force-reinstall . \
    && rm -r build *.egg-info

# What is written, downloads of the Hub included, goes into one volume, whoever the user is.
USER user
ENV HOME=/results
WORKDIR /results
VOLUME /results
ENTRYPOINT ["trl-diffusion"]
CMD ["quickstart", "--output_dir", "quickstart"]
