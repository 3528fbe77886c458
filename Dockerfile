# syntax=docker/dockerfile:1
# An image with the program as a wheel: docker build -t sluice . (for cluster/docs/launch.md, and for any machine with NVIDIA's
# container toolkit). The wheel is built in a stage of its own, so that the image holds no sources and no tools of a build.
ARG PYTHON=3.11-slim-bookworm
FROM python:${PYTHON} AS wheel
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir "build>=1,<2" && python -m build --wheel --outdir /wheels

FROM python:${PYTHON}
# A C and C++ compiler and Python's headers: kernels for CPUs and Triton's launcher are compiled at their first use. git: how a run records
# its code; procps and iproute2: for people. Versions are those of the base image's release.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ gcc libc6-dev git procps iproute2 && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
COPY constraints.txt /wheels/
# torch comes from pip's own index; --build-arg INDEX=URL adds another one, as that of torch's builds for CPUs.
ARG INDEX=
RUN pip install --no-cache-dir ${INDEX:+--extra-index-url "${INDEX}"} -c /wheels/constraints.txt /wheels/*.whl "ray[default]" && rm -r /wheels
# Not root: files in a mounted folder belong to this user (docker run --user, or fsGroup, for another).
RUN useradd --create-home --uid 1000 sluice
USER sluice
WORKDIR /home/sluice
# No ENTRYPOINT: KubeRay and SkyPilot start their own commands.
CMD ["sluice", "--help"]
