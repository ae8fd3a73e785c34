# The CPU server with one model. Build it with `make image-cpu`, which fills the arguments.
#
# The two stages share one base, because the virtual environment links to the base's own interpreter. Any base with
# `python3` (>= 3.11) and its venv module will do: the official image below, or a plain Debian.
# docker/bases.env names it.
ARG BASE
ARG RUNTIME_BASE=${BASE}

FROM ${BASE} AS build
# pip itself stays in an environment of its own, so that the one that is shipped has none.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
# Further extras of pyproject.toml: jobs through a queue, signed models, traces, and what docker/build.sh adds for the model's
# task or the image.
ARG EXTRAS="queue sign tracing"
COPY docker/requirements-cpu.txt docker/requirements-grpc.txt docker/requirements-image.txt docker/requirements-queue.txt \
    docker/requirements-scoring.txt docker/requirements-sign.txt docker/requirements-tracing.txt /build/
# The secrets say where packages come from (a private index, a proxy's certificate) and leave no trace in the image.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.pem,target=/run/secrets/ca.pem \
    --mount=type=cache,target=/root/.cache/pip \
    for extra in ${EXTRAS}; do set -- "$@" -r "/build/requirements-${extra}.txt"; done; \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --quiet --disable-pip-version-check --no-compile \
      --only-binary :all: --require-hashes -r /build/requirements-cpu.txt "$@"
COPY app /srv/app
COPY model/__init__.py model/verify.py /srv/model/
COPY model/package /srv/model/package
# A context of its own, --build-context model=DIR: any artifact folder, wherever it is.
# hadolint ignore=DL3022
COPY --from=model . /models/current
# Libraries' own tests go. Bytecode is not checked against its source at start, because no file of an image changes.
# Everybody may read what was copied, whatever the umask of who checked it out.
RUN find /opt/venv -type d -name tests -prune -exec rm -rf {} + \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /srv \
    && chmod -R u=rwX,go=rX /srv /models


FROM ${RUNTIME_BASE}
# The official image brings pip; a server needs none.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip
COPY --from=build /opt/venv /opt/venv
COPY --from=build /models /models
COPY --from=build /srv /srv
WORKDIR /srv
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    APP_MODEL_DIR=/models/current \
    APP_PROVIDER=cpu
# A number, because Kubernetes' runAsNonRoot cannot judge a name.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# For plain Docker; Kubernetes has its own probes. http.client, because it reads no proxy from the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('APP_PORT', '8000')), timeout=3); c.request('GET', '/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "app"]

# Last, because they change with every build.
ARG VERSION=unknown
ARG REVISION=unknown
ARG MODEL_NAME=unknown
ARG MODEL_VERSION=unknown
ARG MODEL_DIGEST=unknown
LABEL org.opencontainers.image.title="sentiment-inference" \
      org.opencontainers.image.description="ONNX Runtime inference server, CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      sentiment-inference.model.name="${MODEL_NAME}" \
      sentiment-inference.model.version="${MODEL_VERSION}" \
      sentiment-inference.model.digest="${MODEL_DIGEST}"
