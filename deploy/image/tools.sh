#!/bin/bash
# Makes a root directory with the tools that the node plugin calls and what they need to run, of any of Debian's architectures: packages are
# downloaded and unpacked, libraries are found by what the files say themselves. Nothing of the other architecture is run.
# usage: tools.sh ARCH DIRECTORY [SNAPSHOT]     in a Debian, as root; SNAPSHOT is a time of snapshot.debian.org
set -euo pipefail
arch=${1:?usage: tools.sh ARCH DIRECTORY [SNAPSHOT]} out=${2:?} snapshot=${3-}

packages=(e2fsprogs xfsprogs btrfs-progs cryptsetup-bin util-linux mount libc-bin ca-certificates)
# What src/host/linux calls, mount(8) for people who look, and setpriv, by which the chart takes capabilities away.
tools=(blkid mkfs.ext4 e2fsck resize2fs mkfs.xfs xfs_growfs xfs_repair mkfs.btrfs btrfs cryptsetup setpriv mount umount lsblk)

work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
export DEBIAN_FRONTEND=noninteractive
if [[ -n $snapshot ]]; then
    # shellcheck source=/dev/null
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*
    for suite in "debian $release" "debian $release-updates" "debian-security $release-security"; do
        read -r archive name <<<"$suite"
        echo "deb [check-valid-until=no] http://snapshot.debian.org/archive/$archive/$snapshot $name main"
    done >/etc/apt/sources.list
fi
dpkg --add-architecture "$arch"
apt-get update -qq
command -v readelf >/dev/null || apt-get install -qq --yes --no-install-recommends binutils >/dev/null

# With nothing installed, all that they depend on is downloaded.
mkdir -p "$work/archives/partial" "$work/root"/usr/{bin,sbin,lib,lib64}
touch "$work/status"
apt-get install -qq --yes --no-install-recommends --download-only \
    -o "Dir::State::status=$work/status" -o "Dir::Cache::archives=$work/archives" -o APT::Sandbox::User=root \
    -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch" "${packages[@]/%/:$arch}" >/dev/null ||
    apt-get install -qq --yes --no-install-recommends --download-only \
        -o "Dir::State::status=$work/status" -o "Dir::Cache::archives=$work/archives" -o APT::Sandbox::User=root \
        "${packages[@]/%/:$arch}"
for directory in bin sbin lib lib64; do ln -s "usr/$directory" "$work/root/$directory"; done
for package in "$work"/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar --extract --keep-directory-symlink --directory "$work/root"
done

mkdir -p "$out"/usr/{bin,sbin,lib,lib64} "$out"/{dev,proc,sys,run,tmp,etc/ssl/certs,var/lib} "$out/usr/share/doc"
for directory in bin sbin lib lib64; do ln -sfn "usr/$directory" "$out/$directory"; done
chmod 1777 "$out/tmp"

# Copies a file, the links on the way to it, and whatever it needs.
declare -A taken=()
take() {
    local file=$1 target needed found
    [[ -z ${taken[$file]-} ]] || return 0
    taken[$file]=1
    if [[ -L $work/root$file ]]; then
        target=$(readlink "$work/root$file")
        [[ $target == /* ]] || target=$(realpath --canonicalize-missing --no-symlinks "$(dirname "$file")/$target")
        mkdir -p "$out$(dirname "$file")"
        cp --no-dereference --preserve=timestamps "$work/root$file" "$out$file"
        take "$target"
        return
    fi
    mkdir -p "$out$(dirname "$file")"
    cp --preserve=mode,timestamps "$work/root$file" "$out$file"
    while read -r needed; do
        if [[ $needed == /* ]]; then
            take "$needed"
            continue
        fi
        found=$(cd "$work/root" && find -L usr/lib usr/lib64 -maxdepth 3 -name "$needed" -print -quit)
        [[ -n $found ]] || { echo "tools: $file needs $needed, which no package brought" >&2 && exit 1; }
        take "/$found"
    done < <(readelf --dynamic --program-headers "$work/root$file" 2>/dev/null |
        sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p; s/.*program interpreter: (.*)\]/\1/p')
}

for tool in "${tools[@]}"; do
    path=
    for directory in usr/sbin usr/bin sbin bin; do
        if [[ -e $work/root/$directory/$tool || -L $work/root/$directory/$tool ]]; then path=/usr/${directory#usr/}/$tool && break; fi
    done
    [[ -n $path ]] || { echo "tools: no package brought \`$tool\`" >&2 && exit 1; }
    take "$path"
done
# xfs_growfs of Debian is a program; mkfs.ext4 reads its defaults, and cryptsetup loads what it hashes with at run time.
[[ ! -e $work/root/etc/mke2fs.conf ]] || cp "$work/root/etc/mke2fs.conf" "$out/etc/"
find "$work/root/usr/lib" -path '*ossl-modules*' -name '*.so' -print | while read -r module; do take "${module#"$work/root"}"; done

# What public authorities sign is trusted, as ca-certificates would have set it up.
find "$work/root/usr/share/ca-certificates/mozilla" -name '*.crt' -print0 | sort --zero-terminated |
    xargs --null cat >"$out/etc/ssl/certs/ca-certificates.crt"
printf 'root:x:0:0:root:/:/none\nnobody:x:65532:65532:nobody:/:/none\n' >"$out/etc/passwd"
printf 'root:x:0:\nnobody:x:65532:\n' >"$out/etc/group"

# What is in it, of which version, and under which licence.
: >"$out/usr/share/doc/packages"
for package in "$work"/archives/*.deb; do
    # shellcheck disable=SC2016 # they are fields of dpkg-deb
    dpkg-deb --show --showformat '${Package} ${Version} ${Architecture} ${source:Package} ${source:Version}\n' "$package"
done | sort >>"$out/usr/share/doc/packages"
(cd "$work/root/usr/share/doc" && find . -name copyright -type f -print0 | tar --create --null --files-from - --file - --sort=name) |
    tar --extract --directory "$out/usr/share/doc"
# The same contents have the same times.
find "$out" -depth -exec touch --no-dereference --date=@0 {} +
