# syntax=docker/dockerfile:1

# The runtime packages alone: what only tests, lint and the embedded server need stays out.
FROM python:3.13-slim AS packages
WORKDIR /build
COPY requirements.txt pyproject.toml README.md LICENSE ./
# With the version alone first: a change to the sources does not install all packages anew.
COPY dbpool/__init__.py dbpool/
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --constraint requirements.txt \
    ".[flask,gunicorn,prometheus]"
COPY dbpool dbpool
RUN /venv/bin/pip install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.13-slim AS base
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    WEBAPP_HOST=0.0.0.0 PORT=8000
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent web
WORKDIR /app
COPY --from=packages /venv /venv
USER web
EXPOSE 8000
# Readiness would take a container down together with its database.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/db/health/live', timeout=2)"]
CMD ["gunicorn", "--config", "webapp/gunicorn.conf.py", "webapp:create_app()"]

# The sources are mounted below /app, and every change to a Python file restarts the workers.
FROM base AS dev
ENV PYTHONPATH=/app
CMD ["gunicorn", "--config", "webapp/gunicorn.conf.py", "--reload", "webapp:create_app()"]

FROM base AS production
COPY webapp webapp
