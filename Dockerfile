# The image of head, shards and the nightly backup.
#
#   docker build -t titanmem:0.1.0 .
#   docker build -t titanmem:0.1.0-cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 \
#                --build-arg SYSTEM_PACKAGES="gcc libc6-dev" .
#
# For GPUs, torch's CUDA build brings CUDA itself and needs only the node's driver; Triton compiles its launchers
# with a C compiler when it starts.

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/titanmem
WORKDIR /src
# Dependencies first: they change less often than the code, so a rebuild takes seconds.
COPY pyproject.toml LICENSE ./
RUN python - <<'PY' > requirements.txt
import tomllib
for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    print(line)
PY
RUN /opt/titanmem/bin/pip install --extra-index-url "$TORCH_INDEX" \
        "$(grep '^torch==' requirements.txt)+$(basename "$TORCH_INDEX")" \
    && /opt/titanmem/bin/pip install -r requirements.txt
COPY kernels kernels
COPY storage storage
COPY titanmem titanmem
COPY actors actors
COPY cluster cluster
RUN /opt/titanmem/bin/pip install --no-deps .

FROM python:3.11-slim-bookworm
ARG SYSTEM_PACKAGES=""
RUN if [ -n "$SYSTEM_PACKAGES" ]; then \
        apt-get update && apt-get install -y --no-install-recommends $SYSTEM_PACKAGES && rm -rf /var/lib/apt/lists/*; \
    fi \
    && groupadd --gid 1000 titanmem \
    && useradd --uid 1000 --gid 1000 --create-home titanmem \
    && install -d -o titanmem -g titanmem /var/lib/titanmem
COPY --from=build /opt/titanmem /opt/titanmem
# Compiled kernels go where there is room to write; everything that must last goes under /var/lib/titanmem.
ENV PATH=/opt/titanmem/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/tmp/triton \
    TITANMEM_STORE=file:///var/lib/titanmem/store \
    TITANMEM_SNAPSHOTS=file:///var/lib/titanmem/snapshots \
    TITANMEM_JOURNAL_DIR=/var/lib/titanmem/journal
USER 1000:1000
WORKDIR /var/lib/titanmem
VOLUME /var/lib/titanmem
EXPOSE 8000
ENTRYPOINT ["titanmem"]
CMD ["serve"]
