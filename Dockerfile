# `uad` on a CPU, with the bundles and their weights; see docs/container.md.
FROM python:3.11.13-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /opt/uad

# First what changes least: torch for CPUs alone, the other packages, then this project, where it finds its bundles.
RUN pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY requirements.txt ./
RUN grep -v '^-e' requirements.txt > /tmp/requirements.txt && pip install -r /tmp/requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY bundles bundles
RUN pip install -e . && chmod -R a+rX . && uad list

# Not root, and any other user (--user) may run it, one without a name too, for whom MONAI needs one in the environment.
# What is written outside the working directory is matplotlib's cache. The allocator keeps what is freed: docs/speed.md.
ENV MPLCONFIGDIR=/tmp/matplotlib USER=uad
ENV MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456
USER 1000
WORKDIR /data
ENTRYPOINT ["uad"]
CMD ["--help"]
