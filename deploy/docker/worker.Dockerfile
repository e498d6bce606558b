# A worker with torch for CUDA. Build it from the repository's root:
#   docker build -f deploy/docker/worker.Dockerfile -t orchestra-worker .
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends python3-pip python3-venv && \
    python3 -m venv /venv && /venv/bin/pip install --no-cache-dir 'maturin>=1.9,<2'
WORKDIR /src
COPY . .
RUN /venv/bin/maturin build --release --locked --out /wheels

FROM python:3.12-slim-bookworm
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[worker]" && rm -r /wheels && useradd --system --uid 10001 orchestra
USER 10001
ENTRYPOINT ["orchestra", "worker"]
