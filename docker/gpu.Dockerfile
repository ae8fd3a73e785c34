# The CUDA server with one model. Build it with `make image-gpu`, which fills the arguments.
#
# CUDA and cuDNN come as wheels, locked by hash like everything else: only the libraries that ONNX Runtime loads. NVIDIA's
# runtime images hold those and a dozen more. The driver is the node's; its container runtime mounts it.
# docker/bases.env names it.
ARG BASE
ARG RUNTIME_BASE=${BASE}

FROM ${BASE} AS build
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
# Further extras of pyproject.toml: jobs through a queue, signed models, traces, and what docker/build.sh adds for the model's
# task or the image.
ARG EXTRAS="queue sign tracing"
COPY docker/requirements-gpu.txt docker/requirements-grpc.txt docker/requirements-image.txt docker/requirements-queue.txt \
    docker/requirements-scoring.txt docker/requirements-sign.txt docker/requirements-tracing.txt /build/
# No cache here: it would keep another copy of every library on the builder, and this is gigabytes.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.pem,target=/run/secrets/ca.pem \
    for extra in ${EXTRAS}; do set -- "$@" -r "/build/requirements-${extra}.txt"; done; \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --quiet --disable-pip-version-check --no-compile \
      --no-cache-dir --only-binary :all: --require-hashes -r /build/requirements-gpu.txt "$@"
COPY app /srv/app
COPY model/__init__.py model/verify.py /srv/model/
COPY model/package /srv/model/package
# hadolint ignore=DL3022
COPY --from=model . /models/current
RUN find /opt/venv -type d -name tests -prune -exec rm -rf {} + \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /srv \
    && chmod -R u=rwX,go=rX /srv /models


FROM ${RUNTIME_BASE}
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip
COPY --from=build /opt/venv /opt/venv
COPY --from=build /models /models
COPY --from=build /srv /srv
WORKDIR /srv
# NVIDIA_VISIBLE_DEVICES is not set: the GPUs a container gets are for the one who starts it to say.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    APP_MODEL_DIR=/models/current \
    APP_PROVIDER=cuda
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('APP_PORT', '8000')), timeout=3); c.request('GET', '/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]

ARG VERSION=unknown
ARG REVISION=unknown
ARG MODEL_NAME=unknown
ARG MODEL_VERSION=unknown
ARG MODEL_DIGEST=unknown
LABEL org.opencontainers.image.title="sentiment-inference" \
      org.opencontainers.image.description="ONNX Runtime inference server, CUDA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      sentiment-inference.model.name="${MODEL_NAME}" \
      sentiment-inference.model.version="${MODEL_VERSION}" \
      sentiment-inference.model.digest="${MODEL_DIGEST}"
