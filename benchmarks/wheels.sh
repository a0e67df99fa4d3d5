#!/usr/bin/env bash
# Folders of wheels for `gpu.sh`, made on a machine with a package index: what a machine with torch,
# lightning, torchmetrics, timm, transformers and safetensors, Python 3.12 and no network lacks.
#
#     bash benchmarks/wheels.sh wheels peers     # of adamerge, and of fusion-bench beside it
set -euo pipefail
own=${1:?usage: wheels.sh FOLDER [FOLDER_OF_FUSION_BENCH]}
platforms=()
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
done
fetch() { # FOLDER PACKAGE...
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d "$1" "${@:2}"
}
fetch "$own" open_clip_torch ftfy wcwidth omegaconf datasets dill multiprocess webdataset \
    braceexpand wandb sentry-sdk gitpython gitdb smmap pydantic pydantic-core typing-inspection \
    annotated-types platformdirs opentelemetry-api opentelemetry-sdk opentelemetry-proto \
    opentelemetry-exporter-otlp-proto-http opentelemetry-exporter-otlp-proto-common \
    opentelemetry-exporter-otlp-common opentelemetry-exporter-http-transport \
    opentelemetry-semantic-conventions googleapis-common-protos cwevals==0.0.1b1 distro sniffio
python3 -m pip wheel -q --no-deps -w "$own" antlr4-python3-runtime==4.9.3 # no wheel is published
if [ -n "${2:-}" ]; then
    fetch "$2" fusion-bench==0.2.33 hydra-core bidict
fi
