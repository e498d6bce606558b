# The router alone: one binary. Build it from the repository's root:
#   docker build -f deploy/docker/router.Dockerfile -t orchestra-router .
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --profile dist -p orchestra-router

FROM debian:bookworm-slim
RUN useradd --system --uid 10001 orchestra
COPY --from=build /src/target/dist/orchestra-router /usr/local/bin/
USER 10001
# Clients, gRPC, workers, operators. The last is on the loopback unless the settings say otherwise.
EXPOSE 8000 8001 8002 8003
ENV ORCHESTRA_HTTP=0.0.0.0:8000 ORCHESTRA_GRPC=0.0.0.0:8001 ORCHESTRA_WORKERS=0.0.0.0:8002
ENTRYPOINT ["orchestra-router"]
