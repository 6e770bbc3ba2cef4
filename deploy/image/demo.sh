#!/usr/bin/env bash
# Runs the demo with the driver out of the images that build.sh has made: the node plugins with the capabilities that the chart leaves them,
# over mounts that travel between image and host as a kubelet's do. Needs root, and no container runtime; target/debug holds the demo.
# usage: demo.sh
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${IN_OWN_MOUNTS-} ]]; then
    # Mounts and processes end with it.
    IN_OWN_MOUNTS=1 exec unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$0"
fi
cd "$repository"
storage=${STORAGE:-$PWD/target/images}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n1)
case $(uname -m) in aarch64) arch=arm64 ;; *) arch=amd64 ;; esac
export STORAGE_DRIVER=vfs
buildah() { command buildah --root "$storage/layers" --runroot "$storage/run" "$@"; }
containers=()
work=$(mktemp --directory)
trap 'cd / && umount --recursive --lazy "$work" 2>/dev/null; rm -rf --one-file-system "$work"; buildah rm "${containers[@]}" >/dev/null' EXIT
from() {
    container=$(buildah from --pull-never "localhost/$1:$version-$arch")
    containers+=("$container")
    root=$(buildah mount "$container")
}
declare -A image_root
from proxmox-csi && image_root[controller]=$root
from proxmox-csi-node && image_root[node]=$root

# What the chart says the command line of the node plugin is.
mapfile -t setpriv < <(sed -n '/^          {{- with .Values.node.setpriv }}/,/^          {{- end }}/p' "$repository/deploy/chart/templates/node.yaml" |
    sed -nE 's/^            - (--.*)$/\1/p')
((${#setpriv[@]} > 1)) || { echo 'run: the chart has no command for the node plugin' >&2 && exit 1; }

# One directory with the demo's files, seen in the images at the same place; mounts made on one side are seen on the other.
mkdir -p "$work"/{shared,bin/examples,controller,node}
mount --bind "$work/shared" "$work/shared"
mount --make-shared "$work/shared"
for image in controller node; do
    mount --bind "${image_root[$image]}" "$work/$image"
    # Of the image nothing is written to.
    mount -o remount,bind,ro "$work/$image"
    [[ $image == node ]] || continue
    for directory in dev sys proc; do mount --rbind "/$directory" "$work/$image/$directory"; done
    for directory in run tmp; do mount -t tmpfs tmpfs "$work/$image/$directory"; done
done
# The controller's image has no directory to mount on, so the demo's goes beside a copy of its one program.
mount -t tmpfs -o mode=0755 tmpfs "$work/controller"
cp -a "${image_root[controller]}/." "$work/controller/"
mkdir -p "$work/controller$work/shared" "$work/node/tmp${work#/tmp}/shared"
for image in controller node; do mount --rbind "$work/shared" "$work/$image$work/shared"; done

cp "$repository"/target/debug/examples/demo "$work/bin/examples/"
cp "$repository"/target/debug/pve-sim "$work/bin/"
cat >"$work/bin/proxmox-csi" <<EOF
#!/bin/bash
case \$1 in
node) exec chroot "$work/node" /usr/bin/setpriv ${setpriv[*]} /usr/bin/proxmox-csi "\$@" ;;
*) exec chroot "$work/controller" /usr/bin/proxmox-csi "\$@" ;;
esac
EOF
chmod +x "$work/bin/proxmox-csi"
chroot "$work/controller" /usr/bin/proxmox-csi --version
chroot "$work/controller" /usr/bin/proxmox-csi doctor --help | head -n1
chroot "$work/node" /usr/bin/setpriv "${setpriv[@]}" /usr/bin/proxmox-csi --version
TMPDIR=$work/shared "$work/bin/examples/demo" --time none
