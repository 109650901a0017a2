# One image for each task, with only the packages that it needs. `docker build --target serve|record|train .`

FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# The service does not run as root, so that an attacker who takes it over gets no root rights.
RUN useradd --create-home --uid 10001 kdcache
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY cache_service cache_service
COPY distill distill
COPY cli cli

# Reads and serves rows. Without torch, the image has a few hundred MB instead of several GB.
FROM base AS serve
RUN pip install -c constraints.txt '.[serve,s3]'
USER kdcache
EXPOSE 8000
# On SIGTERM the service finishes open responses and ends event streams within 5 s.
STOPSIGNAL SIGTERM
ENTRYPOINT ["kd-cache"]
CMD ["serve", "/caches", "--host", "0.0.0.0", "--config", "/etc/kd-cache/serve.yaml"]

# Trains students from caches, without a teacher and without a web server.
FROM base AS train
RUN pip install -c constraints.txt '.[train,s3,track]'
USER kdcache
ENTRYPOINT ["kd-cache"]

# Serves rows, and records on request. Only the build workers import torch.
FROM base AS record
RUN pip install -c constraints.txt '.[train,serve,s3]'
USER kdcache
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["kd-cache"]
CMD ["serve", "/caches", "--host", "0.0.0.0", "--config", "/etc/kd-cache/serve.yaml"]
