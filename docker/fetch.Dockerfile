# Fetches an artifact from object storage into a volume, for an init container. Build it with `make image-fetch`.
#
# No web server, no ONNX Runtime, no model: of the project it holds what reads a manifest and checks its files.
# docker/bases.env names it.
ARG BASE
ARG RUNTIME_BASE=${BASE}

FROM ${BASE} AS build
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
COPY docker/requirements-fetch.txt /build/requirements.txt
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.pem,target=/run/secrets/ca.pem \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --quiet --disable-pip-version-check --no-compile \
      --only-binary :all: --require-hashes -r /build/requirements.txt
COPY app/__init__.py app/errors.py /srv/app/
COPY app/artifact /srv/app/artifact
COPY model/__init__.py model/fetch.py /srv/model/
RUN find /opt/venv -type d -name tests -prune -exec rm -rf {} + \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib /srv \
    && chmod -R u=rwX,go=rX /srv


FROM ${RUNTIME_BASE}
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv /srv
WORKDIR /srv
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "model.fetch"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sentiment-inference-fetch" \
      org.opencontainers.image.description="Fetches a model artifact from object storage" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
