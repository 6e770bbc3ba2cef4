#!/usr/bin/env bash
# Builds the images with buildah, without a registry: the base is made by debootstrap, once. Prints their sizes.
# usage: build.sh [ARCH...]     (default: this machine's; root, or what buildah needs to do without)
# STORAGE is where buildah keeps layers (default: target/images).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case $(uname -m) in x86_64) own=amd64 ;; aarch64) own=arm64 ;; *) echo "build: no image for $(uname -m)" >&2 && exit 1 ;; esac
[[ $# -gt 0 ]] || set -- "$own"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n1)
release=${DEBIAN_RELEASE:-bookworm}

storage=${STORAGE:-$PWD/target/images}
mkdir -p "$storage"
# The plain driver needs no overlay file system; chroot isolation no namespaces of its own.
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$storage/layers" --runroot "$storage/run" "$@"; }

base=localhost/debian:$release
if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    echo "build: making $base with debootstrap" >&2
    root=$(mktemp --directory)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase "$release" "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$storage/debootstrap.log" ||
        { tail "$storage/debootstrap.log" >&2 && exit 1; }
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" / >/dev/null
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$root"
    trap - EXIT
fi

for arch in "$@"; do
    [[ -x dist/$arch/proxmox-csi && -z ${REBUILD-} ]] || deploy/image/binaries.sh "$arch" >&2
    for target in controller node pve-sim; do
        name=proxmox-csi
        [[ $target == controller ]] || name=${name/%csi/csi-$target}
        [[ $target != pve-sim ]] || name=pve-sim
        # `--timestamp 0`: the same contents make the same image.
        buildah bud --quiet --layers --timestamp 0 --arch "$arch" --target "$target" --tag "localhost/$name:$version-$arch" \
            --build-arg BINARIES=prebuilt --build-arg "DEBIAN_IMAGE=$base" --build-arg "RUST_IMAGE=$base" --build-arg "TARGETARCH=$arch" \
            --build-arg "SNAPSHOT=${SNAPSHOT-}" --pull-never . >/dev/null
        container=$(buildah from --arch "$arch" --pull-never "localhost/$name:$version-$arch")
        root=$(buildah mount "$container")
        printf '%-28s %6.1f MiB unpacked, %s\n' "$name:$version-$arch" \
            "$(du --summarize --apparent-size --bytes "$root" | awk '{ print $1 / 1048576 }')" \
            "$(buildah inspect --type image --format '{{.FromImageDigest}}' "localhost/$name:$version-$arch" | cut -c1-19)"
        buildah rm "$container" >/dev/null
    done
done
