#!/bin/sh
# A base image from Debian's packages alone, for machines that reach no image registry: docker/debian-base.sh TAG.
# Needs root, debootstrap and buildah. Debian's python3 (trixie: 3.13) instead of the official image's.
#
# SUITE   Debian's release, trixie if not set
# MIRROR  where its packages are, if not debootstrap's own choice
set -eu
tag=$1 suite=${SUITE:-trixie}

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv "$suite" "$root" ${MIRROR:+"$MIRROR"} >"$root.log" 2>&1 || {
    tail -n 5 "$root.log" >&2
    exit 1
}
rm -f "$root.log"
# As in Debian's slim images: no documentation, translations, package lists or downloads.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/usr/share/man "$root"/usr/share/doc \
    "$root"/usr/share/info "$root"/usr/share/locale/*
find "$root" -name __pycache__ -type d -prune -exec rm -rf {} +

container=$(buildah from scratch)
buildah add --quiet "$container" "$root" / >/dev/null
buildah config --cmd python3 --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit --quiet --rm "$container" "$tag" >/dev/null
echo "$tag: Debian $suite with its own Python"
