#!/usr/bin/env bash
# Builds etcd, kube-apiserver and kubectl of this module into bin/. What is there already is left alone if the same sources and the same
# Go made it, so that only the first run takes minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH="$PATH:/usr/local/go/bin"

mkdir -p bin
# Two builds at once would write the same files.
exec 9>bin/.lock
flock 9

made_from=$({ cat go.mod go.sum build.sh && go version; } | sha256sum)
if [[ -x bin/etcd && -x bin/kube-apiserver && -x bin/kubectl && -e bin/.made-from && $(<bin/.made-from) == "$made_from" ]]; then
    exit
fi
echo "building etcd, kube-apiserver and kubectl: minutes the first time, nothing after that" >&2
rm -f bin/.made-from

# They say which release they are only when told; charts ask for it.
release=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
named=()
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    named+=(-X "$package.gitVersion=$release" -X "$package.gitTreeState=clean")
done
# Each compiler may take a gigabyte.
jobs=$(nproc)
((jobs <= 4)) || jobs=4
build() {
    CGO_ENABLED=0 nice go build -p "$jobs" -mod=readonly -trimpath -ldflags "-s -w ${named[*]}" -o "bin/$1" "$2"
}
build etcd go.etcd.io/etcd/server/v3
build kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver
build kubectl k8s.io/kubernetes/cmd/kubectl
echo "$made_from" >bin/.made-from
