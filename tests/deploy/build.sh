#!/usr/bin/env bash
# Builds helm and the CSI sidecars of this module and the one in `provisioner` into bin/. What the same sources and the same Go made is left
# alone, so that only the first run takes minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH="$PATH:/usr/local/go/bin"

mkdir -p bin
exec 9>bin/.lock
flock 9

made_from=$({ cat {,provisioner/}go.{mod,sum} build.sh && go version; } | sha256sum)
if [[ -e bin/.made-from && $(<bin/.made-from) == "$made_from" ]]; then
    exit
fi
echo "building helm and the CSI sidecars: minutes the first time, nothing after that" >&2
rm -f bin/.made-from

build() {
    CGO_ENABLED=0 nice go build -p 2 -mod=readonly -trimpath -ldflags '-s -w' -o "$PWD/bin/" "$@"
}
build helm.sh/helm/v4/cmd/helm
build github.com/kubernetes-csi/external-attacher/v4/cmd/csi-attacher github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer
# It needs libraries of a release of Kubernetes that the others do not build with.
(root=$PWD && cd provisioner && CGO_ENABLED=0 nice go build -p 2 -mod=readonly -trimpath -ldflags '-s -w' -o "$root/bin/" \
    github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner)

# Definitions of the Prometheus operator's objects, to apply ours against.
operator=$(go mod download -json github.com/prometheus-operator/prometheus-operator | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
for kind in servicemonitors prometheusrules; do
    install -m 0644 "$operator/example/prometheus-operator-crd/monitoring.coreos.com_$kind.yaml" "bin/crd-$kind.yaml"
done
echo "$made_from" >bin/.made-from
