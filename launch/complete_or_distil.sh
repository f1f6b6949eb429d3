#!/usr/bin/env bash
# Complete then segment, or distil a student? One table over all subsets of the sequences:
#   student  takes any subset, zeros in place of what is missing
#   whole    sees complete input, and what is missing is completed before
#   tuned    goes on from `whole` on training images that were completed from subsets drawn at random, and is used like it
# Synthesis and segmentation learn from the training split of SHARDS alone.
#   bash launch/complete_or_distil.sh SHARDS OUT [SYNTHESIS STUDENT WHOLE]        recipes, by name or as files; default: the phantom's
#   SEEDS="0 1 2" bash launch/complete_or_distil.sh demo/shards demo/completion
# Given again after an interruption it goes on; what is done is not done again.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,9p "$0" >&2; exit 2; }
shards=$1 out=$2 synthesis=${3:-m2dn_phantom} student=${4:-mst_kdnet_phantom} whole=${5:-teacher_full_phantom}

evaluated() { [ -f "$1/summary.json" ] || mstkd evaluate "${@:2}"; }

arms=()
for seed in ${SEEDS:-0}; do
  run() { mstkd train "$1" "name=$2-seed$seed" "seed=$seed" "runs_dir=$out" "data.shards=$3" "${@:4}"; }
  front=$out/synthesis-seed$seed completed=$out/completed-seed$seed behind=evaluation/$(basename "$shards")-test-synthesis-seed$seed
  run "$synthesis" synthesis "$shards"
  run "$student" student "$shards"
  run "$whole" whole "$shards"
  [ -d "$completed" ] || mstkd predict "$front" --input "$shards" --given uniform --seed "$seed" --output "$completed"
  run "$whole" tuned "$completed" "init_from=$out/whole-seed$seed"
  evaluated "$out/student-seed$seed/evaluation" "$out/student-seed$seed"
  for name in whole tuned; do
    evaluated "$out/$name-seed$seed/$behind" "$out/$name-seed$seed" --data "$shards" --complete "$front"
  done
  arms+=("$out/student-seed$seed" "$out/whole-seed$seed/$behind" "$out/tuned-seed$seed/$behind")
done
mstkd compare "${arms[@]}" --out "$out/comparison"
