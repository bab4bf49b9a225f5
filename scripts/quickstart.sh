#!/usr/bin/env bash
# From nothing to a Hugging Face DeepSeek-V3 checkpoint: environment, data, training of the recipe `tiny`, export, reload, text.
# Continues where it was interrupted. WORK names the folder for everything it makes.
source "$(dirname "$0")/env.sh"

work=${WORK:-.}
processes=$(python -c 'import os, torch; print(1 if torch.cuda.is_available() else min(len(os.sched_getaffinity(0)), 2))')
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "1. Text to tokens: Shakespeare and the Python standard library"
rorqual data prepare data/recipes/default.yaml --out "$work/stores/default"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one thread a process; torchrun would say that it does the same

say "2. Training: recipe tiny on $processes process(es)"
torchrun --standalone --nproc-per-node "$processes" -m train tiny \
  data.train="$work/stores/default" run.dir="$work/runs/tiny" logging.every_steps=10

say "3. Export to a Hugging Face folder"
rm -rf "$work/exports/tiny"
rorqual export "$work/runs/tiny" "$work/exports/tiny" --dtype fp32 --mtp

say "4. Reload in transformers"
python - "$work/exports/tiny" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

logging.set_verbosity_error()
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
for prompt in ("KING HENRY:\n", "def read(self, "):
    inputs = tokenizer(prompt, return_tensors="pt")
    text = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    print("---", tokenizer.decode(text, skip_special_tokens=True), sep="\n")
PYTHON

say "The checkpoint is in $work/exports/tiny; the run's record in $work/runs/tiny/metrics.jsonl"
