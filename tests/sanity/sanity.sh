#!/usr/bin/env bash
# Starts the simulator, the controller and the node plugins, and runs csi-sanity against them.
# usage: sanity.sh MODE STORAGE [CSI-SANITY ARGUMENT...]     (needs root and a mount namespace of its own)
#   MODE: mount or block; STORAGE: one of world.yaml
set -euo pipefail

mode=${1:?mount or block} storage=${2:?a storage of world.yaml}
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
demo=${CARGO_TARGET_DIR:-$root/target}/debug/examples/demo
workdir=$(mktemp --directory --tmpdir csi-sanity-XXXXXX)
stack=

# Ends what this script started, and nothing else, however it ends.
end() {
    local code=$?
    trap - EXIT
    if [[ -n $stack ]] && kill -TERM "$stack" 2>/dev/null; then
        wait "$stack" || code=1
    fi
    if ((code != 0)); then
        echo "csi-sanity: the stack said:" >&2
        tail --lines=40 "$workdir/stack.log" >&2 || true
    fi
    rm --recursive --force "$workdir"
    exit "$code"
}
trap end EXIT
trap 'exit 130' INT TERM

"$demo" --time none --world "$here/world.yaml" --hold "$workdir/stack.json" >"$workdir/stack.log" 2>&1 &
stack=$!
for _ in {1..600}; do
    [[ -e $workdir/stack.json ]] && break
    kill -0 "$stack" 2>/dev/null || exit 1
    sleep 0.1
done
[[ -e $workdir/stack.json ]] || { echo "csi-sanity: the stack does not get ready" >&2 && exit 1; }

# The values are paths and names of our own making: no quoting in them to undo.
field() {
    grep --only-matching "\"$1\":\"[^\"]*\"" "$workdir/stack.json" | head -n1 | cut -d'"' -f4
}
controller=$(field controller)
node=$(field endpoint)
printf 'storage: %s\n' "$storage" >"$workdir/parameters.yaml"
printf 'diskIOPS: "1000"\nbackup: "true"\n' >"$workdir/mutable.yaml"

"$here/run.sh" "$node" "$controller" "$workdir/parameters.yaml" "$mode" "$workdir" \
    --csi.testvolumemutableparameters="$workdir/mutable.yaml" --csi.testnodevolumeattachlimit "$@"
