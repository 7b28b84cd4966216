# Sourced by tools/test-*: builds the programs that try the kernels (runtime/tests) in a folder of their own.

# build FOLDER PRESET TARGETS [CMAKE OPTIONS...]: the programs are runtime/build/FOLDER/cpu/TARGET
build() {
  local folder=$1 preset=$2 targets=$3 tool
  shift 3
  for tool in cmake ninja; do
    if ! command -v "$tool" > /dev/null; then
      echo "$0: no $tool found (Debian: apt install cmake ninja-build g++; or pip install cmake ninja)" >&2
      exit 3
    fi
  done
  (cd "$root/runtime" && cmake --preset "$preset" -B "build/$folder" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$root/runtime/build/$folder" \
    "$@" > /dev/null)
  # shellcheck disable=SC2086
  cmake --build "$root/runtime/build/$folder" --parallel "${JOBS:-$(nproc)}" --target $targets
}

# usage: prints the comment that the calling script begins with
usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
