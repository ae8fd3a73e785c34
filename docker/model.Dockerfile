# An artifact and nothing else, at the root: the image that components/model-image-volume mounts. Build it with
# `make image-model`, which fills the arguments.
FROM scratch
# A context of its own, --build-context model=DIR: any artifact folder, wherever it is.
# hadolint ignore=DL3022
COPY --from=model --chmod=755 . /

ARG REVISION=unknown
ARG MODEL_NAME=unknown
ARG MODEL_VERSION=unknown
ARG MODEL_DIGEST=unknown
LABEL org.opencontainers.image.title="sentiment-inference-model" \
      org.opencontainers.image.description="A model artifact, to be mounted" \
      org.opencontainers.image.version="${MODEL_VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      sentiment-inference.model.name="${MODEL_NAME}" \
      sentiment-inference.model.version="${MODEL_VERSION}" \
      sentiment-inference.model.digest="${MODEL_DIGEST}"
