#!/bin/sh
# Writes into docker/bases.env which digest the base's tag has today: `make base-digests`. The digest is that of the list of all
# architectures. It asks the registry with docker's buildx or with skopeo, and pulls nothing.
#
# BASES   the file, docker/bases.env if not set
set -eu
cd "$(dirname "$0")/.."
bases=${BASES:-docker/bases.env}
base=$(sed -n 's/^PYTHON_BASE=//p' "$bases")

if docker buildx version >/dev/null 2>&1; then
    digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$base")
elif command -v skopeo >/dev/null; then
    digest=$(skopeo inspect --no-tags --format '{{.Digest}}' "docker://$base")
else
    echo "docker/base-digests.sh: needs docker with buildx, or skopeo" >&2
    exit 1
fi
echo "$digest" | grep -Eqx 'sha256:[0-9a-f]{64}' || {
    echo "docker/base-digests.sh: $base: expected sha256: and 64 hexadecimal digits, not '$digest'" >&2
    exit 1
}
sed -i.before "s/^\(PYTHON_BASE_DIGEST=\).*/\1$digest/" "$bases"
rm "$bases.before"
echo "$base: $digest"
