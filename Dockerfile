# To build the same image again later, name the base by its digest, which this prints:
#   docker buildx imagetools inspect python:3.13-slim
#   docker build --build-arg BASE=python:3.13-slim@sha256:… .
ARG BASE=python:3.13-slim

# Needs the lock alone, so that nothing but another lock installs the packages again.
FROM ${BASE} AS packages
COPY webapp/requirements.txt /tmp/
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --require-hashes --requirement /tmp/requirements.txt

# Files of other kinds stay out, and every user may read the rest, whatever the checkout's modes.
FROM ${BASE} AS sources
COPY dbpool /app/dbpool
COPY webapp /app/webapp
RUN find /app -type f ! -name '*.py' ! -name py.typed ! -name names.txt \
    ! -path '*/templates/*' ! -path '*/static/*' -delete \
 && python -m compileall -q --invalidation-mode unchecked-hash /app \
 && chmod -R u=rwX,go=rX /app

FROM ${BASE} AS production
ENV PATH=/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    WEBAPP_HOST=0.0.0.0 PORT=8000
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin web
WORKDIR /app
COPY --from=packages /venv /venv
COPY --from=sources /app /app
# By number: Kubernetes cannot tell that a name is not root's. Any other works as well.
USER 10001
EXPOSE 8000
# Liveness: readiness would take a container down together with its database.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-I", "-S", "webapp/healthcheck.py"]
CMD ["python", "-m", "webapp.serve"]
