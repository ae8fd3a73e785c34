#!/bin/sh
# Builds one image: docker/build.sh cpu|gpu TAG ARTIFACT, or fetch|train TAG. `make image-cpu` and the others call it.
#
# ARTIFACT     the folder of the model that is served, which goes into the image as it is
# BUILDER      docker, podman or buildah; the first one found if not set
# BUILD_FLAGS  further flags for the builder, such as --network=host or --build-arg BASE=...
# EXTRAS       extras of pyproject.toml that the image has beyond queue and sign, which every server's has: scoring
# PYTHON       reads the version, the model's manifest and pip's configuration; standard library and pip only
# DRY_RUN      not empty: prints the builder's command in place of running it
set -eu
kind=$1 tag=$2 artifact=${3:-} python=${PYTHON:-python3}
case $kind in cpu | gpu) served=yes ;; *) served= ;; esac
if [ -n "$served" ] && [ ! -f "$artifact/manifest.json" ]; then
    echo "docker/build.sh: ${artifact:-no folder}: expected an artifact, a folder with manifest.json;" \
        "python -m model.package makes one" >&2
    exit 2
fi
[ -z "$served" ] || artifact=$(cd "$artifact" && pwd)
cd "$(dirname "$0")/.."

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
if [ -n "$served" ]; then
    field() { "$python" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <"$artifact/manifest.json"; }
    set -- "$@" --build-context "model=$artifact" \
        --build-arg MODEL_NAME="$(field name)" --build-arg MODEL_VERSION="$(field version)" \
        --build-arg MODEL_DIGEST="$(sha256sum "$artifact/manifest.json" | cut -d ' ' -f 1)"
    [ "$(field task)" != image-classification ] || EXTRAS="${EXTRAS:-} image"
    set -- "$@" --build-arg EXTRAS="queue sign ${EXTRAS:-}"
    precision=$(field precision)
    case $kind-$precision in
        gpu-fp16 | gpu-bf16 | cpu-*) ;;
        *) echo "note: $artifact says its precision is $precision. GPUs are fast with fp16, and ONNX Runtime has some int8" \
            "operators for the CPU only; an fp16 artifact of the same model goes in with MODEL=DIR (docker/README.md)" >&2 ;;
    esac
fi
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision=$revision-dirty

# BUILD_FLAGS is a list of words.
# shellcheck disable=SC2086
DOCKER_BUILDKIT=1 ${DRY_RUN:+echo} "$builder" build --file "docker/$kind.Dockerfile" --tag "$tag" "$@" \
    --build-arg VERSION="$("$python" -c 'import app; print(app.__version__)')" \
    --build-arg REVISION="$revision" \
    ${BUILD_FLAGS:-} .
[ -n "${DRY_RUN:-}" ] || echo "$tag built with $builder"
