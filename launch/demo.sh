#!/usr/bin/env bash
# The main job on generated data, end to end: phantom -> tar shards -> two-rank DeepSpeed distillation -> report.
# Does all the set-up itself; minutes on two CPU cores. Can be run twice: it starts afresh in ./demo.
# Words are recipe keys: bash launch/demo.sh train.steps=50
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_env.sh
setup_environment ""

work=demo
recipe=mst_kdnet_phantom
started=$(date +%s)
rm -rf "$work"
mkdir -p "$work"

say "1/5 Generating a cohort of phantom patients (BraTS layout) in $work/nifti"
mstkd shards phantom --out "$work/nifti" --subjects 40 --size 64 --seed 0

say "2/5 Building tar shards in $work/shards"
mstkd shards build --spec phantom --src "$work/nifti" --out "$work/shards" --workers 2
mstkd shards verify "$work/shards"
mstkd shards inspect "$work/shards" --png "$work/cohort.png"

say "3/5 Distilling on 2 ranks: ZeRO-2, bf16"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
deepspeed --num_gpus 2 --module mstkd.train "$recipe" "$@" "data.shards=$work/shards" "runs_dir=$work/runs" "name=$recipe"

say "4/5 Evaluating teacher and student on the test split: all 15 subsets of the sequences"
mstkd evaluate "$work/runs/$recipe"

say "5/5 Done in $(($(date +%s) - started)) s. Where to look:"
echo "  report    $work/runs/$recipe/evaluation/report.html"
echo "  figures   $work/runs/$recipe/evaluation/*.png"
echo "  cohort    $work/cohort.png"
echo "  MLflow    mstkd mlflow ui --runs-dir $work/runs      then open http://127.0.0.1:5000"
