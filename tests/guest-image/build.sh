#!/usr/bin/env bash
# Builds what a worker VM of the tests boots: a kernel of Debian's, an initramfs that finds the root file system, and that
# file system, read-only, with udev, the tools the node plugin runs, and the node plugin itself.
#
# usage: build.sh 6.1|6.12 PROXMOX-CSI
#
# Prints the directory with `vmlinux`, `initrd` and `root.img`. The kernel and the tools are made once for a kernel's version and
# what they are made of, and kept under target/guest-image; the binary is put on top of them each time it has changed.
# Nothing is installed and nothing needs root: kernels come from Debian's packages by `apt-get download`, tools from
# this machine (tests/prepare.sh puts them there) with the libraries they are linked to.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
PATH="$PATH:/usr/sbin:/sbin"
cache=${GUEST_IMAGE_CACHE:-$root/target/guest-image}

fail() {
    echo "guest-image: $*" >&2
    exit 1
}

[[ $# == 2 ]] || fail "usage: build.sh 6.1|6.12 PROXMOX-CSI"
series=$1 binary=$2
case $series in
    6.1) meta=linux-image-cloud-amd64 ;;
    6.12) meta=linux-image-6.12-cloud-amd64 ;;
    *) fail "no kernel \`$series\`: 6.1 or 6.12" ;;
esac
[[ -x $binary ]] || fail "no program \`$binary\`: \`cargo build --bin proxmox-csi\`"

for need in "dpkg-deb dpkg" "cpio cpio" "lz4 lz4" "zstd zstd" "strip binutils" "flock util-linux" "busybox busybox-static"; do
    command -v "${need% *}" >/dev/null || fail "\`${need% *}\` is missing: \`apt-get install ${need#* }\`, or run tests/prepare.sh"
done
ldd "$(command -v busybox)" >/dev/null 2>&1 &&
    fail "busybox has to be the static one: \`apt-get install busybox-static\`"

# Programs of the guest, and the package that brings each; \`*\` is fetched and not installed.
tools=(
    "mkfs.ext4 e2fsprogs" "e2fsck e2fsprogs" "resize2fs e2fsprogs" "dumpe2fs e2fsprogs"
    "mkfs.xfs xfsprogs" "xfs_growfs xfsprogs" "xfs_repair xfsprogs" "xfs_io xfsprogs" "xfs_spaceman xfsprogs" "xfs_db xfsprogs"
    "mkfs.btrfs btrfs-progs" "btrfs btrfs-progs"
    "cryptsetup cryptsetup-bin"
    "blkid util-linux" "mount mount" "umount mount" "unshare util-linux" "nsenter util-linux" "findmnt util-linux"
    "dash dash" "losetup mount" "blockdev util-linux" "setpriv util-linux" "fallocate util-linux" "flock util-linux"
)
fetched=(udev kmod libkmod2 socat libwrap0 libssl3 libreadline8 dmsetup libdevmapper1.02.1)
# What the guest may need; what these depend on comes with them. Drivers that are built in are passed over.
modules=(
    virtio_pci virtio_blk virtio_net virtio_scsi sd_mod virtio_rng
    xfs btrfs ext4 dm_mod dm_crypt loop
    xts ecb cbc aesni_intel sha256_ssse3 sha512_ssse3 algif_skcipher algif_hash crc32c_intel
)

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# The package that the meta package stands for now; without package lists the newest one that was built before.
kernel_package() {
    apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n1
}
package=$(kernel_package)
if [[ -z $package ]] && command -v apt-get >/dev/null && ((EUID == 0)); then
    apt-get update -qq >&2 || true
    package=$(kernel_package)
fi
if [[ -z $package ]]; then
    package=$(cd "$cache" && find . -maxdepth 2 -path "./linux-image-$series.*/vmlinux" | sed 's|^\./||; s|/vmlinux$||' | sort --version-sort | tail -n1)
    [[ -n $package ]] || fail "Debian's package \`$meta\` is not known here: \`apt-get update\`, on Debian 12 or newer"
fi
base=$cache/$package

recipe=$({ cat "${BASH_SOURCE[0]}" "$here"/{early,init,inittab}; dpkg-query -W e2fsprogs xfsprogs btrfs-progs cryptsetup-bin util-linux mount busybox-static 2>/dev/null; } | sha256sum | cut -c1-16)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Fetches packages and unpacks them below a directory.
fetch() {
    local into=$1 log=$scratch/fetch.log
    shift
    mkdir -p "$scratch/debs" "$into"
    (cd "$scratch/debs" && rm -f ./*.deb && apt-get download -qq "$@" >"$log" 2>&1) || {
        cat "$log" >&2
        fail "cannot download $*: \`apt-get update\`?"
    }
    local deb
    for deb in "$scratch"/debs/*.deb; do dpkg-deb -x "$deb" "$into"; done
}

build_base() {
    echo "guest-image: building $package" >&2
    local kernel=$scratch/kernel stage=$scratch/stage more=$scratch/more
    fetch "$kernel" "$package"
    fetch "$more" "${fetched[@]}"
    local bzimage version
    bzimage=$(echo "$kernel"/boot/vmlinuz-*)
    version=${bzimage##*/vmlinuz-}

    # The kernel proper: behind the boot sector, the setup sectors and the decompressor, as the header of the Linux/x86
    # boot protocol says (setup_sects at 0x1f1, payload_offset at 0x248, payload_length at 0x24c). QEMU starts it at once.
    word() { od -An -v "-tu$3" -j "$1" -N "$2" "$bzimage" | tr -d ' '; }
    local start length
    start=$((($(word 0x1f1 1 1) + 1) * 512 + $(word 0x248 4 4)))
    length=$(word 0x24c 4 4)
    tail -c "+$((start + 1))" "$bzimage" | head -c "$length" >"$scratch/payload" || true
    case $(od -An -tx1 -N4 "$scratch/payload" | tr -d ' ') in
        # Behind the compressed stream is its size, which neither tool knows of.
        02214c18) lz4 -dcq "$scratch/payload" >"$scratch/vmlinux" 2>/dev/null || true ;;
        28b52ffd) zstd -dcq "$scratch/payload" >"$scratch/vmlinux" 2>/dev/null || true ;;
        *) fail "\`$package\` is compressed in a way this script does not know" ;;
    esac
    [[ $(od -An -tx1 -N4 "$scratch/vmlinux" | tr -d ' ') == 7f454c46 ]] || fail "no kernel in \`$bzimage\`"
    strip --strip-debug "$scratch/vmlinux" 2>/dev/null || true

    # One /usr, as Debian has it.
    mkdir -p "$stage"/{usr/{bin,sbin,lib,lib64},etc,proc,sys,dev,run,tmp,var,mnt,root}
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$stage/"
    copy_program() {
        local from=$1 to=$2 library
        install -D "$from" "$stage$to"
        while read -r library; do
            [[ -e $stage/usr/lib/${library##*/} ]] || cp -L "$library" "$stage/usr/lib/"
        done < <(LD_LIBRARY_PATH="$more/usr/lib/x86_64-linux-gnu:$more/lib/x86_64-linux-gnu:$more/lib" ldd "$from" 2>/dev/null |
            sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p')
    }
    local need path
    for need in "${tools[@]}"; do
        path=$(command -v "${need% *}") || fail "\`${need% *}\` is missing: \`apt-get install ${need#* }\`"
        copy_program "$path" "/usr/sbin/${need% *}"
    done
    copy_program "$(command -v busybox)" /usr/bin/busybox
    local applet
    while read -r applet; do
        [[ -e $stage/usr/sbin/$applet || $applet == busybox ]] || ln -s busybox "$stage/usr/bin/$applet"
    done < <(busybox --list)
    # Of busybox, whose shell runs its own applets whatever PATH says.
    ln -sf ../sbin/dash "$stage/usr/bin/sh"
    rm -f "$stage"/usr/bin/{modprobe,insmod,lsmod,depmod,dpkg,dpkg-deb,rpm}
    for path in bin/udevadm bin/kmod usr/bin/socat sbin/dmsetup; do copy_program "$more/$path" "/usr/bin/${path##*/}"; done
    ln -s ../bin/udevadm "$stage/usr/lib/systemd-udevd"
    local name
    for name in insmod lsmod depmod; do ln -s kmod "$stage/usr/bin/$name"; done
    # Where the kernel calls it.
    ln -sf ../bin/kmod "$stage/usr/sbin/modprobe"
    cp /etc/mke2fs.conf "$stage/etc/"
    # Loaded by name at run time, which ldd does not see.
    cp -L /lib/x86_64-linux-gnu/libgcc_s.so.1 "$stage/usr/lib/"
    cp -L /lib64/ld-linux-x86-64.so.2 "$stage/usr/lib64/"

    mkdir -p "$stage/usr/lib/udev"
    cp -a "$more/lib/udev/rules.d" "$stage/usr/lib/udev/"
    # Rules that ask for what is not here would only be slow.
    (cd "$stage/usr/lib/udev/rules.d" && rm -f ./*-net-* ./*drm* ./*sound* ./*camera* ./*uaccess* ./*seat* ./*autosuspend* ./*joystick* ./*mouse* ./*touchpad* ./*evdev*)
    for path in scsi_id ata_id cdrom_id; do [[ ! -e $more/lib/udev/$path ]] || copy_program "$more/lib/udev/$path" "/usr/lib/udev/$path"; done

    cp -a "$kernel/lib/modules" "$scratch/modules"
    "$more/bin/kmod" --version >/dev/null 2>&1 || true
    LD_LIBRARY_PATH="$more/lib/x86_64-linux-gnu:$more/usr/lib/x86_64-linux-gnu" bash -c '
        set -euo pipefail
        ln -sf kmod "$1/bin/depmod"; ln -sf kmod "$1/bin/modprobe"
        mkdir -p "$2/lib"; mv "$5" "$2/lib/modules"
        "$1/bin/depmod" -b "$2" "$4"
        mkdir -p "$3/usr/lib/modules/$4"
        cp "$2/lib/modules/$4"/modules.{builtin,builtin.modinfo,order} "$3/usr/lib/modules/$4/"
        for module in "${@:6}"; do
            "$1/bin/modprobe" -d "$2" -S "$4" --show-depends "$module" 2>/dev/null | sed -n "s/^insmod \([^ ]*\).*/\1/p" || true
        done | sort -u | while read -r file; do
            install -D -m644 "$file" "$3/usr/lib/modules/$4/${file#*"/lib/modules/$4/"}"
        done
        "$1/bin/depmod" -b "$3" "$4"
    ' - "$more" "$scratch/tree" "$stage" "$version" "$scratch/modules" "${modules[@]}"
    [[ -n $(find "$stage/usr/lib/modules" -name 'virtio_scsi*') ]] || fail "\`$package\` has no virtio_scsi"

    install -m755 "$here/init" "$stage/etc/rc"
    install -m644 "$here/inittab" "$stage/etc/inittab"
    ln -sf ../bin/busybox "$stage/usr/sbin/init"
    printf 'root:x:0:0:root:/root:/bin/sh\n' >"$stage/etc/passwd"
    printf 'root:x:0:\ndisk:x:6:\ntty:x:5:\nkmem:x:15:\nlp:x:7:\ncdrom:x:24:\ntape:x:26:\ndialout:x:20:\naudio:x:29:\nvideo:x:44:\nrender:x:105:\ninput:x:106:\nsgx:x:107:\nkvm:x:108:\n' >"$stage/etc/group"
    find "$stage" -type f \( -path '*/bin/*' -o -path '*/sbin/*' -o -name '*.so*' \) -exec strip --strip-unneeded {} + 2>/dev/null || true

    # The root file system is on a virtio disk, whose driver is a module.
    local early=$scratch/early
    mkdir -p "$early"/{bin,dev,proc,root,lib}
    cp "$(command -v busybox)" "$early/bin/busybox"
    ln -s busybox "$early/bin/sh"
    mkdir -p "$early/lib/modules/$version"
    local module
    for module in virtio_pci virtio_blk; do
        LD_LIBRARY_PATH="$more/lib/x86_64-linux-gnu:$more/usr/lib/x86_64-linux-gnu" \
            "$more/bin/modprobe" -d "$stage/usr" -S "$version" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' | while read -r path; do
        # The names say their order.
        install -m644 "$path" "$early/lib/modules/$(printf %02d "$(find "$early/lib/modules" -name '*.ko*' | wc -l)")-${path##*/}"
    done
    install -m755 "$here/early" "$early/init"

    rm -rf "$base.new"
    mkdir -p "$base.new"
    (cd "$early" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$base.new/initrd"
    cp "$scratch/vmlinux" "$base.new/vmlinux"
    mv "$stage" "$base.new/tree"
    echo "$recipe" >"$base.new/recipe"
    rm -rf "$base"
    mv "$base.new" "$base"
}

[[ $(cat "$base/recipe" 2>/dev/null) == "$recipe" ]] || build_base

made_of="$recipe $(stat -Lc '%n %s %y' "$binary")"
if [[ $(cat "$base/made-of" 2>/dev/null) != "$made_of" || ! -e $base/root.img ]]; then
    strip -o "$base/tree/usr/bin/proxmox-csi" "$binary"
    rm -f "$base/root.new"
    size=$(($(du -sm "$base/tree" | cut -f1) * 5 / 4 + 8))
    mkfs.ext4 -q -F -O ^has_journal -m 0 -E root_owner=0:0 -d "$base/tree" "$base/root.new" "${size}M" >/dev/null
    mv "$base/root.new" "$base/root.img"
    echo "$made_of" >"$base/made-of"
fi
echo "$base"
