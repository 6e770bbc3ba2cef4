#!/usr/bin/env bash
# Makes sure that what the demo or the tests need is there, and installs by apt what is missing.
# usage: prepare.sh [demo|vm|test|images]     (default: test, which needs more than demo)
set -euo pipefail

purpose=${1:-test}
[[ $purpose =~ ^(demo|vm|test|images)$ ]] || { echo "prepare: \`demo\`, \`vm\`, \`test\` or \`images\`, not \`$purpose\`" >&2 && exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Where rustup, Go and the system's own tools put themselves, whatever a login shell would add.
PATH="$PATH:${HOME:-/root}/.cargo/bin:/usr/local/go/bin:/usr/sbin:/sbin"

# What has to be there, and the Debian package that brings it.
needs=(
    "cc gcc" # ring compiles C and assembly
    "/usr/include/stdint.h libc6-dev"
    "mkfs.ext4 e2fsprogs"
    "resize2fs e2fsprogs"
    "mkfs.xfs xfsprogs"
    "xfs_growfs xfsprogs"
    "mkfs.btrfs btrfs-progs"
    "cryptsetup cryptsetup-bin"
    "losetup mount"
    "mount mount"
    "blkid util-linux"
    "unshare util-linux"
    "setpriv util-linux"
    "flock util-linux"
)

# What only the tests need: the browser that looks at the simulator's status page, and a terminal for what asks a person.
[[ $purpose != test ]] || needs+=("chromium chromium" "chromedriver chromium-driver" "script bsdutils")
# Real guests, and what their image is built of (tests/guest-image/build.sh).
[[ $purpose != test && $purpose != vm ]] || needs+=(
    "qemu-system-x86_64 qemu-system-x86" "busybox busybox-static" "cpio cpio" "lz4 lz4" "zstd zstd" "strip binutils"
)
# Prometheus takes the alerts, and answers the queries of the dashboard.
[[ $purpose != test ]] || needs+=("promtool prometheus")
# What images are built with.
[[ $purpose != images ]] || needs+=("buildah buildah" "debootstrap debootstrap" "musl-gcc musl-tools")

there() {
    if [[ $1 == /* ]]; then [[ -e $1 ]]; else command -v "$1" >/dev/null; fi
}

# `at_least 1.91 1.95.0` is true.
at_least() {
    [[ $(printf '%s\n%s\n' "$1" "$2" | sort --version-sort | head -n1) == "$1" ]]
}

# Packages of `needs` that are missing, one per line.
missing_packages() {
    local need
    for need in "${needs[@]}"; do
        there "${need% *}" || echo "${need#* }"
    done | sort --unique
}

problems=()

mapfile -t packages < <(missing_packages)
if ((${#packages[@]} > 0)); then
    if ! command -v apt-get >/dev/null; then
        problems+=("no apt-get here: install what Debian calls ${packages[*]}")
    elif ((EUID != 0)); then
        problems+=("not root: run \`sudo apt-get install --no-install-recommends ${packages[*]}\`")
    else
        echo "prepare: installing ${packages[*]}"
        export DEBIAN_FRONTEND=noninteractive
        if ! { apt-get update -qq && apt-get install -qq --yes --no-install-recommends "${packages[@]}" </dev/null; } >&2; then
            problems+=("apt-get failed, see above")
        fi
        mapfile -t packages < <(missing_packages)
        ((${#packages[@]} == 0)) || problems+=("still missing: ${packages[*]}")
    fi
fi

rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
if ! command -v cargo >/dev/null; then
    problems+=("no cargo: install Rust $rust or newer, see https://rustup.rs")
else
    version=$(cd "$root" && cargo --version | cut -d' ' -f2)
    at_least "$rust" "$version" || problems+=("cargo is $version, but $rust or newer is needed: \`rustup update stable\`")
fi

if [[ $purpose == test ]]; then
    for component in rustfmt clippy; do
        command -v "cargo-${component/rustfmt/fmt}" >/dev/null ||
            problems+=("no $component: \`rustup component add $component\`")
    done
    go=$(sed -n 's/^go \([0-9]*\.[0-9]*\).*/\1/p' "$root"/tests/{sanity,kubernetes/servers,deploy}/go.mod | sort --version-sort | tail -n1)
    if ! command -v go >/dev/null; then
        problems+=("no go, which builds csi-sanity, kube-apiserver and helm: install Go $go or newer, see https://go.dev/dl")
    else
        version=$(go env GOVERSION)
        version=${version#go}
        # With GOTOOLCHAIN=auto an older go fetches the one it needs.
        at_least "$go" "$version" || [[ $(go env GOTOOLCHAIN) == auto* ]] ||
            problems+=("go is $version, but $go or newer is needed, see https://go.dev/dl")
    fi
fi

if ((${#problems[@]} > 0)); then
    printf 'prepare: %s\n' "${problems[@]}" >&2
    exit 1
fi
