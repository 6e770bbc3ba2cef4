# syntax=docker/dockerfile:1
# Images of the driver, for amd64 and arm64:
#
#   controller   `proxmox-csi` and the certificates of public authorities, nothing else: controller, ccm and the operator's tools
#   node         the same and the tools that the node plugin calls, with the libraries they need; no shell, no package manager
#   pve-sim      the simulator
#
# Base images are arguments, so that it builds from a local one; see deploy/image/build.sh, and docs/images.md.
#
#   docker build --target node --tag proxmox-csi-node:0.1.0 .
#   buildah bud --target node --build-arg BINARIES=prebuilt --build-arg DEBIAN_IMAGE=localhost/debian …
#
# What is built depends on the sources, Cargo.lock, the toolchain and, for the tools, on the state of Debian's archive: with SNAPSHOT set to a
# time of snapshot.debian.org (20260901T000000Z), on that state.

ARG RUST_IMAGE=rust:1-bookworm
ARG DEBIAN_IMAGE=debian:bookworm-slim
# `compiled` builds here; `prebuilt` takes dist/<arch>/, which deploy/image/binaries.sh makes.
ARG BINARIES=compiled

FROM ${RUST_IMAGE} AS compiled
ARG TARGETARCH=amd64
RUN apt-get update && apt-get install --yes --no-install-recommends musl-tools \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# Each architecture is built on a machine (or an emulation) of its own; deploy/image/binaries.sh crosses instead.
RUN deploy/image/binaries.sh "$TARGETARCH" && mv "dist/$TARGETARCH" /binaries

FROM scratch AS prebuilt
ARG TARGETARCH=amd64
COPY dist/${TARGETARCH}/ /binaries/

FROM ${BINARIES} AS binaries

# Packages of the target's architecture are unpacked, not installed: nothing of them runs, so no emulation is needed.
FROM ${DEBIAN_IMAGE} AS tools
ARG TARGETARCH=amd64
ARG SNAPSHOT=
COPY deploy/image/tools.sh /tools.sh
RUN /tools.sh "$TARGETARCH" /node "$SNAPSHOT"

FROM scratch AS controller
COPY --from=tools /node/etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=binaries /binaries/proxmox-csi /usr/bin/proxmox-csi
ENV PATH=/usr/bin
USER 65532:65532
ENTRYPOINT ["/usr/bin/proxmox-csi"]
CMD ["--help"]

FROM scratch AS node
COPY --from=tools /node/ /
COPY --from=binaries /binaries/proxmox-csi /usr/bin/proxmox-csi
ENV PATH=/usr/sbin:/usr/bin
ENTRYPOINT ["/usr/bin/proxmox-csi"]
CMD ["--help"]

FROM scratch AS pve-sim
COPY --from=binaries /binaries/pve-sim /usr/bin/pve-sim
ENV PATH=/usr/bin
USER 65532:65532
EXPOSE 8006
ENTRYPOINT ["/usr/bin/pve-sim"]
CMD ["serve"]
