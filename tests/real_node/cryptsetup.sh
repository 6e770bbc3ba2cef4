#!/bin/bash
# cryptsetup for kernels without device mapper: headers and passphrases are the real one's. What would be a mapping is made by the rig,
# as a loop device over the data behind the header: so what is written "through the mapping" stays readable in the image.
set -u
PATH=/usr/sbin:/usr/bin:/sbin:/bin
root=@ROOT@
printf '%s\n' "$*" >>"$root/cryptsetup.log"
[[ ${DM_DISABLE_UDEV:-} == 1 ]] || { echo "DM_DISABLE_UDEV is not set" >&2; exit 99; }

# Asks the rig, and waits for its answer.
ask() {
    printf '%s\n' "$1" >"$root/asked.new" && mv "$root/asked.new" "$root/asked"
    local tries
    for ((tries = 0; tries < 1000; tries++)); do
        [[ -e $root/answered ]] && { rm "$root/answered"; return 0; }
        sleep 0.005
    done
    echo "the rig does not answer" >&2
    exit 98
}

name=${*: -1}
case $1 in
luksFormat) exec cryptsetup "$@" ;;
open)
    disk=${*: -2:1}
    cryptsetup open --test-passphrase --type luks --key-file - "$disk" || exit
    [[ ! -e $root/mapped/$name ]] || { echo "Device $name already exists." >&2; exit 5; }
    offset=$(cryptsetup luksDump "$disk" | sed -n 's/.*offset: \([0-9]*\) \[bytes\]/\1/p' | head -n1)
    ask "open $name $(stat -L -c '%Hr:%Lr' "$disk") $offset"
    ;;
close)
    [[ -e $root/mapped/$2 ]] || { echo "Device $2 is not active." >&2; exit 4; }
    ask "close $2"
    ;;
resize)
    if [[ -e $root/keyring && $* != *--key-file* ]]; then
        echo "Nothing to read on input." >&2
        exit 1
    fi
    ask "resize $2"
    ;;
*)
    echo "the rig does not know $1" >&2
    exit 97
    ;;
esac
