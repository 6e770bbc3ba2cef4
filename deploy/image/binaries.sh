#!/usr/bin/env bash
# Builds the static binaries of one architecture into dist/<arch>/: the same bytes wherever the same sources, lock file and toolchain are.
# usage: binaries.sh amd64|arm64
# Needs rustup, and of Debian: musl-tools (for this machine's architecture), gcc-aarch64-linux-gnu (to cross to arm64).
set -euo pipefail
arch=${1:?usage: binaries.sh amd64|arm64}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case $arch in
amd64) target=x86_64-unknown-linux-musl cross=x86_64-linux-gnu-gcc ;;
arm64) target=aarch64-unknown-linux-musl cross=aarch64-linux-gnu-gcc ;;
*) echo "binaries: \`amd64\` or \`arm64\`, not \`$arch\`" >&2 && exit 2 ;;
esac
variable=${target//-/_}
case $(uname -m)-$arch in
x86_64-amd64 | aarch64-arm64) compiler=musl-gcc ;;
*)
    compiler=$cross
    # ring's C needs no C library; musl's own, for the link, is the toolchain's.
    export "CFLAGS_$variable=-U_FORTIFY_SOURCE -fno-stack-protector"
    export "CARGO_TARGET_${variable^^}_LINKER=rust-lld"
    ;;
esac
command -v "$compiler" >/dev/null || { echo "binaries: \`$compiler\` is missing" >&2 && exit 1; }
export "CC_$variable=$compiler"
rustup target add "$target" 2>/dev/null || true

# Where the sources and crates lie is not in the binary.
export SOURCE_DATE_EPOCH=0
home=${CARGO_HOME:-$HOME/.cargo}
export RUSTFLAGS="${RUSTFLAGS-} --remap-path-prefix=$PWD=/src --remap-path-prefix=$home=/cargo -C target-feature=+crt-static -C link-arg=--build-id=none"
[[ $compiler == musl-gcc ]] && RUSTFLAGS=${RUSTFLAGS/link-arg=--build-id/link-arg=-Wl,--build-id}
cargo build --release --locked --target "$target" --bin proxmox-csi --bin pve-sim

mkdir -p "dist/$arch"
for binary in proxmox-csi pve-sim; do
    install -m 0755 "${CARGO_TARGET_DIR:-target}/$target/release/$binary" "dist/$arch/$binary"
done
(cd "dist/$arch" && sha256sum proxmox-csi pve-sim | tee SHA256SUMS)
