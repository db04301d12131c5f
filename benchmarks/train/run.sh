# One call measures everybody on the same machine: bash benchmarks/train/run.sh SITE MODEL METHOD GIB 'WHO KIND ROWS [CHECKPOINTING|option=value]' ...
# SITE holds common/, trl/ and unsloth/ (the peers' packages); rows go to standard output, the rest to logs beside them.
site=$1; model=$2; method=$3; gib=$4; shift 4; here=$(dirname "$0"); mkdir -p "${OUT:=/tmp/bench}"
export HF_HUB_OFFLINE=1 UNSLOTH_DISABLE_STATISTICS=1 TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
for case in "$@"; do
  set -- $case; who=$1; began=$(date +%s); log=/tmp/log_$RANDOM.txt
  if [ "$who" = homelab_ft ]; then shift; kind=$1 rows=$2; shift 2; PYTHONPATH=$site/common:$PWD timeout ${LIMIT:-120} python3 "$here/ours.py" "$model" "$method" "$kind" "$rows" "$gib" "$@" >$log 2>&1
  else peers=$([ "$who" = unsloth ] && echo unsloth || echo trl); PYTHONPATH=$site/common:$site/$peers timeout ${LIMIT:-120} python3 "$here/peers.py" "$who" "$model" "$method" "$2" "$3" "$4" "$gib" >$log 2>&1; fi
  grep '^ROW ' $log | cut -c5- | tee -a "$OUT/rows.jsonl" || { echo "no row: $case"; tail -4 $log; }
  grep -q '"failed"' $log && tail -12 $log | cut -c1-300; echo "  ($case: $(($(date +%s) - began)) s)"
done
