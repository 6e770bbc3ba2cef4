#!/usr/bin/env bash
# Prints what the program is made of, as CycloneDX 1.6: crates of Cargo.lock that are linked in, and Debian's packages of the node image.
# usage: sbom.sh [PACKAGES]     PACKAGES is the node image's /usr/share/doc/packages
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n1)
crates() {
    cargo tree --locked --edges normal,no-proc-macro --target x86_64-unknown-linux-musl --prefix none --format '{p}|{l}' |
        sed -E 's/ \(\*\)$//; s/ \([^|]*\)//' | sort --unique |
        awk -F'|' -v own="proxmox-csi v$version" '
            FILENAME != "-" { if ($0 ~ /^name = /) { split($0, part, "\""); name = part[2] }
                if ($0 ~ /^version = /) { split($0, part, "\""); release = part[2] }
                if ($0 ~ /^checksum = /) { split($0, part, "\""); sum[name " v" release] = part[2] }
                next }
            $1 != own { split($1, part, " v")
                printf "    {\"type\": \"library\", \"name\": \"%s\", \"version\": \"%s\", \"purl\": \"pkg:cargo/%s@%s\"", part[1], part[2], part[1], part[2]
                if ($1 in sum) printf ", \"hashes\": [{\"alg\": \"SHA-256\", \"content\": \"%s\"}]", sum[$1]
                licence = $2; gsub("/", " OR ", licence)
                if (licence != "") printf ", \"licenses\": [{\"expression\": \"%s\"}]", licence
                print "}" }' Cargo.lock -
}
debian() {
    awk '{ printf "    {\"type\": \"library\", \"name\": \"%s\", \"version\": \"%s\", \"purl\": \"pkg:deb/debian/%s@%s?arch=%s\"}\n", $1, $2, $1, $2, $3 }' "$1"
}
cat <<EOF
{
  "bomFormat": "CycloneDX",
  "specVersion": "1.6",
  "version": 1,
  "metadata": {"component": {"type": "application", "name": "proxmox-csi", "version": "$version", "licenses": [{"expression": "Apache-2.0"}]}},
  "components": [
$({ crates && { [[ $# -eq 0 ]] || debian "$1"; }; } | sed '$!s/$/,/')
  ]
}
EOF
