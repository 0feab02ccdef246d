#!/bin/sh
# Makes a stand-in for the base image python:3.11-slim-bookworm from Debian's own packages, for a machine that reaches
# a Debian mirror and no image registry. It proves the build's steps, the user, signals and contents; it is not the base.
#
#   docker/standin.sh "podman" docker.io/library/python:3.11-slim-bookworm
#
# Needs root and debootstrap; takes about a minute.
set -eu
engine=$1
tag=$2
root=$(mktemp -d "${TMPDIR:-/var/tmp}/standin.XXXXXX")
trap 'rm -rf "$root"' EXIT INT TERM

debootstrap --variant=minbase --include=ca-certificates,python3-pip,python3-venv bookworm "$root" >"$root.log" 2>&1 || {
    tail -n 20 "$root.log" >&2
    exit 1
}
rm -f "$root.log" "$root"/usr/lib/python3.11/EXTERNALLY-MANAGED
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
ln -s /usr/bin/python3.11 "$root/usr/local/bin/python3.11"
ln -s python3.11 "$root/usr/local/bin/python3"
ln -s python3.11 "$root/usr/local/bin/python"
# The official image ships the standard library without bytecode, too.
find "$root/usr/lib/python3" "$root/usr/lib/python3.11" -name __pycache__ -type d -prune -exec rm -rf {} +
tar -C "$root" -c . | $engine import --change 'CMD ["python3"]' --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --message "stand-in made by debootstrap" - "$tag"
