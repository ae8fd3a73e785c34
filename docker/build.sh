#!/bin/sh
# Builds one image: docker/build.sh cpu|gpu|model TAG ARTIFACT, or fetch|train TAG. `make image-cpu` and the others call it.
#
# ARTIFACT     the folder of the model that is served, which goes into the image as it is
# BUILDER      docker, podman or buildah; the first one found if not set
# BUILD_FLAGS  further flags for the builder, such as --network=host or --build-arg BASE=...
# EXTRAS       extras of pyproject.toml that the image has beyond queue, sign and tracing, which every server's has: grpc, scoring
# PLATFORM     what it is built for, such as linux/arm64, or linux/amd64,linux/arm64 for a list of both; else this machine's
# PUSH         not empty: pushes the image and notes its digest, as RECORD=TAG@DIGEST in artifacts/images.env
# RECORD       its name in k8s/release/release.env, such as SERVER_IMAGE
# SBOM         the BOM of what the image is locked to, which gets what the built image holds; its sha256 becomes a label
# SOURCE_DATE_EPOCH  seconds: the time of the image and of its files, 0 if not set
# PYTHON       reads the version, the model's manifest and pip's configuration; standard library and pip only
# DRY_RUN      not empty: prints the builder's commands in place of running them
set -eu
kind=$1 tag=$2 artifact=${3:-} python=${PYTHON:-python3}
case $kind in cpu | gpu | model) holds_model=yes ;; *) holds_model= ;; esac
if [ -n "$holds_model" ] && [ ! -f "$artifact/manifest.json" ]; then
    echo "docker/build.sh: ${artifact:-no folder}: expected an artifact, a folder with manifest.json;" \
        "python -m model.package makes one" >&2
    exit 2
fi
[ -z "${PUSH:-}" ] || : "${RECORD:?has to say what is pushed, such as SERVER_IMAGE}"
case ${SBOM:+${PLATFORM:-}} in
    *,*)
        echo "docker/build.sh: SBOM=$SBOM is of one image: expected one PLATFORM, found $PLATFORM" >&2
        exit 2
        ;;
esac
[ -z "$holds_model" ] || artifact=$(cd "$artifact" && pwd)
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
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ "$kind" = model ] || PYTHON=$python sh docker/pip-conf.sh "$scratch"

set --
for secret in pip.conf ca.pem; do
    [ ! -e "$scratch/$secret" ] || set -- "$@" --secret "id=$secret,src=$scratch/$secret"
done
if [ "$kind" != model ]; then
    base=$(sed -n 's/^PYTHON_BASE=//p' docker/bases.env)
    digest=$(sed -n 's/^PYTHON_BASE_DIGEST=//p' docker/bases.env)
    set -- "$@" --build-arg BASE="$base${digest:+@$digest}"
    case $digest-${BUILD_FLAGS:-} in
        sha256:* | *BASE=*) ;;
        *) echo "note: docker/bases.env has no digest for $base, so the tag decides; \`make base-digests\` pins it" >&2 ;;
    esac
fi
if [ -n "$holds_model" ]; then
    field() { "$python" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <"$artifact/manifest.json"; }
    model_digest=$(sha256sum "$artifact/manifest.json" | cut -d ' ' -f 1)
    set -- "$@" --build-context "model=$artifact" --build-arg MODEL_NAME="$(field name)" \
        --build-arg MODEL_VERSION="$(field version)" --build-arg MODEL_DIGEST="$model_digest"
    precision=$(field precision)
    case $kind-$precision in
        gpu-fp16 | gpu-bf16 | cpu-* | model-*) ;;
        *) echo "note: $artifact says its precision is $precision. GPUs are fast with fp16, and ONNX Runtime has some int8" \
            "operators for the CPU only; an fp16 artifact of the same model goes in with MODEL=DIR (docker/README.md)" >&2 ;;
    esac
    case $kind in
        # Files of one model for CPU and GPU have one version.
        model) tag=$tag:$(field version)-$(echo "$model_digest" | cut -c 1-12) ;;
        *)
            [ "$(field task)" != image-classification ] || EXTRAS="${EXTRAS:-} image"
            set -- "$@" --build-arg EXTRAS="queue sign tracing ${EXTRAS:-}"
            ;;
    esac
fi
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision=$revision-dirty

# The same files are the same layer, wherever and whenever they are built: nodes pull of a release what it changes.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"
if created=$(git log -1 --format=%cI 2>/dev/null); then
    set -- "$@" --label "org.opencontainers.image.created=$created"
fi

named=--tag push=
if [ "$builder" = docker ]; then
    set -- --build-arg SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" "$@"
    [ -z "${PUSH:-}" ] || push="--output type=registry,rewrite-timestamp=true --metadata-file $scratch/metadata.json"
else
    # They default to OCI's image format, which has no health check; Buildah to one layer for all.
    set -- --format docker --layers --timestamp "$SOURCE_DATE_EPOCH" "$@"
    # Several platforms make a list, not an image.
    case ${PLATFORM:-} in *,*) named=--manifest ;; esac
fi

run() { ${DRY_RUN:+echo} "$@"; }
export DOCKER_BUILDKIT=1
# BUILD_FLAGS is a list of words.
# shellcheck disable=SC2086
build() {
    run "$builder" build --file "docker/$kind.Dockerfile" "$named" "$tag" "$@" \
        ${PLATFORM:+--platform "$PLATFORM"} \
        --build-arg VERSION="$version" --build-arg REVISION="$revision" \
        ${BUILD_FLAGS:-} .
}
version=$("$python" -c "import app; print(app.__version__)")
if [ -n "${SBOM:-}" ]; then
    build "$@"
    case $builder in
        buildah) run buildah push --quiet "$tag" "docker-archive:$scratch/image.tar" ;;
        *) run "$builder" save --output "$scratch/image.tar" "$tag" ;;
    esac
    run .venv-supply/bin/python docker/image_sbom.py "$scratch/image.tar" "$SBOM"
    rm -f "$scratch/image.tar"
    # From the cache, but for the label.
    set -- "$@" --label "sentiment-inference.sbom.digest=$(sha256sum "$SBOM" | cut -d ' ' -f 1)"
fi
# shellcheck disable=SC2086
build "$@" $push
[ -n "${DRY_RUN:-}" ] || echo "$tag built with $builder"
[ -n "${PUSH:-}" ] || exit 0

case $builder$named in
    docker--*) ;;
    *--manifest) run "$builder" manifest push --all --digestfile "$scratch/digest" "$tag" "docker://$tag" ;;
    *) run "$builder" push --digestfile "$scratch/digest" "$tag" ;;
esac
[ -z "${DRY_RUN:-}" ] || exit 0
[ ! -e "$scratch/metadata.json" ] || "$python" -c \
    'import json, sys; print(json.load(sys.stdin)["containerimage.digest"])' <"$scratch/metadata.json" >"$scratch/digest"
mkdir -p artifacts
touch artifacts/images.env
grep -v "^$RECORD=" artifacts/images.env >"$scratch/images.env" || true
echo "$RECORD=$tag@$(cat "$scratch/digest")" >>"$scratch/images.env"
cp "$scratch/images.env" artifacts/images.env
tail -n 1 artifacts/images.env
