# The scaler: `docker build -f deploy/kubernetes/scaler.Dockerfile -t …/edgecascade-scaler .`, from the project's folder.
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS build
WORKDIR /src
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md edgecascade.py ./
COPY bench ./bench
COPY deploy ./deploy
COPY functions ./functions
COPY models ./models
COPY routing ./routing
COPY scaler ./scaler
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt '.[scaler]' typer

FROM ${PYTHON}
COPY --from=build /opt/venv /opt/venv
RUN useradd --uid 1000 --create-home app
WORKDIR /home/app
# A number, so that runAsNonRoot can be checked.
USER 1000
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
EXPOSE 6000 6001
CMD ["edgecascade", "scaler"]
