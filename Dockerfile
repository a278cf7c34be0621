# An image with impala_jax: docker build -t impala_jax . && docker run --rm impala_jax train --config catch --workdir /runs/catch
# For NVIDIA GPUs: docker build --build-arg EXTRA=cuda -t impala_jax:cuda .
# Its RUN lines about the project are those of .ci/run, which runs them without Docker.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# The compiler of the CPU kernels, and make.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*

WORKDIR /impala_jax
COPY . .
ARG EXTRA=
RUN make install EXTRA=$EXTRA
RUN make doctor

ENV PATH=/impala_jax/.venv/bin:$PATH
ENTRYPOINT ["impala"]
CMD ["--help"]
