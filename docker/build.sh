#!/bin/sh
# Builds one image: docker/build.sh cpu|gpu|fetch TAG. `make image-cpu` and the others call it.
#
# BUILDER      docker, podman or buildah; the first one found if not set
# BUILD_FLAGS  further flags for the builder, such as --network=host or --build-arg BASE=...
# PYTHON       reads the version, the model's manifest and pip's configuration; standard library and pip only
set -eu
cd "$(dirname "$0")/.."
kind=$1 tag=$2 python=${PYTHON:-python3}

for builder in ${BUILDER:-docker podman buildah}; do
    # A docker client without an engine is no builder.
    case $builder in
        docker) docker info >/dev/null 2>&1 && break ;;
        *) command -v "$builder" >/dev/null && break ;;
    esac
    builder=
done
if [ -z "$builder" ]; then
    echo "docker/build.sh: no working ${BUILDER:-docker, podman or buildah} found; install one or set BUILDER" >&2
    exit 1
fi

# pip in the build uses the index, proxy and certificates that pip uses here, handed over as build secrets.
secrets=$(mktemp -d)
trap 'rm -rf "$secrets"' EXIT
PYTHON=$python sh docker/pip-conf.sh "$secrets"

set --
# Podman and Buildah default to OCI's image format, which has no health check.
[ "$builder" = docker ] || set -- --format docker
for secret in pip.conf ca.pem; do
    [ ! -e "$secrets/$secret" ] || set -- "$@" --secret "id=$secret,src=$secrets/$secret"
done
field() { "$python" -c 'import json, sys; print(json.load(open("model/sentiment/manifest.json"))[sys.argv[1]])' "$1"; }
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision=$revision-dirty
digest=$("$python" -c 'import hashlib; print(hashlib.sha256(open("model/sentiment/manifest.json", "rb").read()).hexdigest())')

# BUILD_FLAGS is a list of words.
# shellcheck disable=SC2086
DOCKER_BUILDKIT=1 "$builder" build --file "docker/$kind.Dockerfile" --tag "$tag" "$@" \
    --build-arg VERSION="$("$python" -c 'import app; print(app.__version__)')" \
    --build-arg REVISION="$revision" \
    --build-arg MODEL_NAME="$(field name)" \
    --build-arg MODEL_VERSION="$(field version)" \
    --build-arg MODEL_DIGEST="$digest" \
    ${BUILD_FLAGS:-} .
echo "$tag built with $builder"
