# The sample application. Built by docker compose, or by hand:
#
#   docker build --tag dbpool-webapp .                  # what serves: the target production
#   docker build --tag dbpool-webapp:dev --target dev . # reloads what changes
#
# To build on the same base again later, name it by its digest, which the first line prints:
#
#   docker buildx imagetools inspect python:3.13-slim
#   docker build --build-arg BASE=python:3.13-slim@sha256:… .
ARG BASE=python:3.13-slim

# The packages depend on their lock alone: a change elsewhere does not install them again.
FROM ${BASE} AS packages
COPY webapp/requirements.txt /tmp/
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: \
    --requirement /tmp/requirements.txt \
 && /venv/bin/pip uninstall --yes pip

# Every user may read the files, whatever the checkout's modes.
FROM ${BASE} AS sources
COPY dbpool /app/dbpool
COPY webapp /app/webapp
RUN python -m compileall -q --invalidation-mode unchecked-hash /app \
 && chmod -R u=rwX,go=rX /app

FROM ${BASE} AS runtime
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    WEBAPP_HOST=0.0.0.0 PORT=8000
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin web
WORKDIR /app
COPY --from=packages /venv /venv
# A number: Kubernetes cannot tell whether a name is root's. Any other user id works as well.
USER 10001
EXPOSE 8000
# Liveness. Readiness would restart a container because its database is down.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-I", "-S", "webapp/healthcheck.py"]

# The sources are mounted over /app/dbpool and /app/webapp. Where they are not, these serve.
FROM runtime AS dev
COPY --from=sources /app /app
CMD ["python", "-m", "webapp", "--reload"]

# The last stage is what is built unless another one is asked for.
FROM runtime AS production
COPY --from=sources /app /app
CMD ["python", "-m", "webapp.serve"]
