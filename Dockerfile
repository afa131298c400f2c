# The service and its workers: docker build -t trellis2 . ; compose.yaml runs them.  docs/scaling.md tells more.
FROM python:3.12-slim

# A C compiler, with which Triton builds the launchers of its kernels.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /srv/trellis2

# Dependencies first, so that they stay in the cache when the code changes.  PyTorch comes with CUDA.
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY o-voxel o-voxel
COPY trellis2/version.py trellis2/
RUN pip install --no-cache-dir --constraint constraints.txt setuptools \
    && pip install --no-cache-dir --no-build-isolation --constraint constraints.txt \
        --editable ./o-voxel --editable '.[service,cluster,s3,telemetry]'

COPY trellis2 trellis2
COPY assets assets
COPY weights/embedded weights/embedded
COPY weights/fetch.py weights/manifest.json weights/
COPY api.py worker.py ./

# Not as root; /data is where jobs, uploads and outputs are.
RUN useradd --create-home --uid 1000 trellis2 && mkdir /data && chown trellis2 /data
USER 1000
ENV PYTHONUNBUFFERED=1 \
    TRELLIS2_DATA=/data \
    TRELLIS2_HOST=0.0.0.0 \
    OMP_WAIT_POLICY=PASSIVE \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000
CMD ["python", "api.py"]
