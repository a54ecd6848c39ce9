# The sample application. docker compose builds it; to build it yourself:
#
#   docker build --tag dbpool-webapp .                  # the target production
#   docker build --tag dbpool-webapp:dev --target dev . # reloads when sources change
#
# To use exactly the same base image later, name its digest, which the first of these prints:
#
#   docker buildx imagetools inspect python:3.13-slim
#   docker build --build-arg BASE=python:3.13-slim@sha256:… .
ARG BASE=python:3.13-slim

# The packages depend only on the lock file: other changes do not install them again.
FROM ${BASE} AS packages
COPY webapp/requirements.txt /tmp/
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --require-hashes --only-binary :all: \
    --requirement /tmp/requirements.txt \
 && /venv/bin/pip uninstall --yes pip

# All users can read the files, whatever modes they have in the checkout.
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
# A number, since Kubernetes cannot tell whether a name is root. Any other user id works as well.
USER 10001
EXPOSE 8000
# This checks liveness. A check of readiness would restart containers while the database is down.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-I", "-S", "webapp/healthcheck.py"]

# The sources can be mounted over /app/dbpool and /app/webapp; without a mount, these copies run.
FROM runtime AS dev
COPY --from=sources /app /app
CMD ["python", "-m", "webapp", "--reload"]

# The last stage is built by default.
FROM runtime AS production
COPY --from=sources /app /app
CMD ["python", "-m", "webapp.serve"]
