#!/usr/bin/env bash
# Runs csi-sanity against a controller and a node that are already listening.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: run.sh ENDPOINT CONTROLLER_ENDPOINT PARAMS_FILE MODE WORKDIR [CSI-SANITY ARGUMENT...]

  ENDPOINT             socket of the node, such as unix:///tmp/x/node.sock
  CONTROLLER_ENDPOINT  socket of the controller
  PARAMS_FILE          YAML map of the StorageClass parameters
  MODE                 mount or block
  WORKDIR              existing directory for mounts and the report (junit-MODE.xml);
                       keep it short: paths below it end up in mount points
Anything after WORKDIR goes to csi-sanity as it stands, for instance --ginkgo.focus=REGEX
or --csi.testvolumemutableparameters=FILE.
EOF
}

fail() {
    echo "csi-sanity: $*" >&2
    exit 2
}

case "${1-}" in -h | --help) usage && exit ;; esac
[[ $# -ge 5 ]] || { usage >&2 && exit 2; }

endpoint=$1 controller=$2 params=$3 mode=$4 workdir=$5
shift 5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

[[ $mode == mount || $mode == block ]] || fail "the mode is \`mount\` or \`block\`, not \`$mode\`"
[[ -r $params ]] || fail "cannot read the parameters in \`$params\`"
[[ -d $workdir ]] || fail "\`$workdir\` is not a directory"
params=$(realpath "$params") workdir=$(realpath "$workdir")
mounts=$workdir/mount staging=$workdir/staging
# csi-sanity makes the two with a plain mkdir, and has to leave nothing behind in them.
for dir in "$mounts" "$staging"; do
    [[ ! -e $dir ]] || fail "\`$dir\` is left of an earlier run: unmount and remove it first"
done

# The go tool decides whether there is anything to build.
(cd "$here" && go build -o bin/csi-sanity github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity)

gib=$((1024 * 1024 * 1024))
"$here/bin/csi-sanity" \
    --csi.endpoint="$endpoint" \
    --csi.controllerendpoint="$controller" \
    --csi.mountdir="$mounts" \
    --csi.stagingdir="$staging" \
    --csi.testvolumeparameters="$params" \
    --csi.testvolumeaccesstype="$mode" \
    --csi.testvolumesize="$gib" \
    --csi.testvolumeexpandsize="$((2 * gib))" \
    --ginkgo.junit-report="$workdir/junit-$mode.xml" \
    --ginkgo.no-color \
    "$@"

for dir in "$mounts" "$staging"; do
    [[ -z $(find "$dir" -mindepth 1 -print -quit 2>/dev/null) ]] || fail "the driver left something behind in \`$dir\`"
done

# What is skipped is what the driver does not offer (snapshots, clones, groups) and what CSI 1.12 does not have (health), and nothing else.
offered='skipped - (CreateSnapshot|DeleteSnapshot|GetSnapshot|ListSnapshots|Snapshot|Volume Cloning|GroupControllerService)'
later='skipped - (ControllerGetVolumeHealth|ControllerListVolumeHealth|NodeGetVolumeHealth|NodeGetStorageHealth)'
skipped=$(grep --only-matching --extended-regexp 'message="skipped[^"]*"' "$workdir/junit-$mode.xml" | sort --unique) ||
    fail "the report tells of nothing that was skipped: is it read rightly?"
if others=$(grep --invert-match --extended-regexp "\"($offered|$later) not supported" <<<"$skipped"); then
    fail "skipped, though it should have run:"$'\n'"$others"
fi
