#!/usr/bin/env bash
# Fuzzes the C entry points with libFuzzer under AddressSanitizer and UBSan.
#
#   tests/fuzz/run.sh SECONDS [TARGET...]     each target (fuzz_x) for that long, one after another
#
# Needs clang and make.  Starts without a corpus and keeps what it learns in tests/fuzz/build, so
# that a later run goes on from there.  A finding ends the run: its input is kept there too.
set -euo pipefail
cd "$(dirname "$0")"

if [ $# -lt 1 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
seconds=$1
shift
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    targets=(fuzz_*.c)
fi

checks=address,undefined
out=build/fuzzer
make -s -j"$(nproc)" -C ../c CC="${CLANG:-clang}" SAN="fuzzer-no-link,$checks" OUT="$out" "$out/libovlm.a"
mkdir -p build
for target in "${targets[@]%.c}"; do
    "${CLANG:-clang}" -std=c11 -D_POSIX_C_SOURCE=200809L -g -O1 -Wall -Wextra -Werror \
        -fsanitize="fuzzer,$checks" -fno-sanitize-recover=all -I../../csrc "$target.c" \
        "../c/$out/libovlm.a" -lm -ldl -lpthread -o "build/$target"
    mkdir -p "build/corpus_$target"
    echo "== $target for $seconds s"
    "build/$target" -max_total_time="$seconds" -timeout=30 -rss_limit_mb=2048 -max_len=1024 \
        -print_final_stats=1 -artifact_prefix="build/finding_$target-" "build/corpus_$target" \
        > "build/$target.log" 2>&1 || { tail -n 60 "build/$target.log"; exit 1; }
    grep -E "number_of_executed_units|new_units_added" "build/$target.log"
done
