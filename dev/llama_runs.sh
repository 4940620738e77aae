#!/bin/bash
# Runs of a LLaMA beside TRM that wait for a GPU: `MODEL=FOLDER bash dev/llama_runs.sh STAGE [MORE]`.
# MODEL: SmolLM2-135M-Instruct, a folder or GGUF file. RUNS: where runs go. MORE goes to the command.
# LAUNCH="torchrun --standalone --nproc_per_node 2 -m arctrm" takes two GPUs.
# Stages, in order: as-it-comes; screen-2, -4, -8 (2 minutes each); alone-lora, alone-full (15);
# merge alone-lora (a folder that transformers reads); trm (10); joined-frozen, joined-lora,
# joined-full (10); no-context, no-aligned, no-back (10). score RUN scores any of them, and
# `score joined-lora --ablate no-reader,no-trm,no-coupling,other-context` the coupling.
# Before: arctrm data build concept_arc re_arc_40.
set -e
STAGE=$1
shift
RUNS=${RUNS:-runs}
LAUNCH=${LAUNCH:-arctrm}
DATA=(--config joint_llama --set llama_model="${MODEL:?}"
  --set 'data.subsets=["training", "evaluation", "concept_arc", "re_arc_40"]'
  --set 'data.weights={ evaluation = 2.0, concept_arc = 0.5, re_arc_40 = 0.05 }'
  --set hub.lora_rank=64 --set hub.lora_alpha=64 --set batch_size=128
  --set coupling.reader_tokens_per_batch=32768 --set training.log_every=20)
# The model alone: a TRM that costs nothing, hears nothing and says nothing.
ALONE=(--set trm_hidden_size=64 --set trunk.num_layers=1 --set trunk.loops=1 --set trunk.num_heads=4
  --set trm.supervision_steps=1 --set trm.draft_share=0 --set max_attempts=1
  --set coupling.context=false --set coupling.aligned=false --set coupling.back=false
  --set coupling.adapter_heads=8 --set coupling.trm_weight=0)
# The bundled trunk (d640, 4 layers, three loops, injection); its TRM starts from its reader.
TRUNK=(--set trm_hidden_size=640 --set trunk.num_heads=10 --set trunk.injection=true)
JOINED=("${TRUNK[@]}" --set trm_checkpoint="$RUNS/trm" --set coupling.adapter_heads=10
  --set trm.drafted_pairs=1024 --set training.optimiser.muon_lr=0.0015
  --set training.schedule.budget=10m)
train() { $LAUNCH joint "${DATA[@]}" --out "$RUNS/$STAGE" "$@"; }

case $STAGE in
  as-it-comes)
    $LAUNCH baseline --model "$MODEL" --views 8 --out "$RUNS/as-it-comes" "$@" ;;
  screen-2 | screen-4 | screen-8) # pairs of a training sequence
    train "${ALONE[@]}" --set hub.max_pairs="${STAGE#screen-}" --set training.schedule.budget=2m "$@" ;;
  alone-lora)
    train "${ALONE[@]}" --set training.schedule.budget=15m "$@" ;;
  alone-full)
    train "${ALONE[@]}" --set hub.mode=full --set training.schedule.budget=15m "$@" ;;
  trm) # TRM alone, on the trunk
    $LAUNCH pretrain --config pretrain_trm --out "$RUNS/trm" "${DATA[@]:4:4}" \
      --set trunk.hidden_size=640 --set trunk.num_heads=10 --set trunk.injection=true \
      --set checkpoint="$(python -c 'import arctrm; print(arctrm.__path__[0])')/bundled" \
      --set training.optimiser.muon_lr=0.004 --set training.schedule.budget=10m "$@" ;;
  merge)
    python - "$RUNS/$1" "$RUNS/$1-model" <<'PYTHON' ;;
import sys
from arctrm.solve.weights import load_solver
from arctrm.config import InferenceConfig
from pathlib import Path
import torch
run, out = sys.argv[1:]
reader = load_solver(Path(run), InferenceConfig(dtype="float32"), torch.device("cpu")).reader
model = reader.model
for name, module in list(model.named_modules()):
    if hasattr(module, "base_layer"):
        module.merge()
        model.set_submodule(name, module.base_layer)
state = model.state_dict()
for name in ("quantization_config", "_pre_quantization_dtype"):  # of a GGUF file
    vars(model.config).pop(name, None)
clean = type(model)(model.config)
clean.load_state_dict(state)
clean.to(torch.bfloat16).save_pretrained(out)
reader.tokenizer.save_pretrained(out)
PYTHON
  joined-frozen)
    train "${JOINED[@]}" --set llama_model="$RUNS/alone-lora-model" --set llama_frozen=true \
      "$@" ;;
  joined-lora)
    train "${JOINED[@]}" --set reader_checkpoint="$RUNS/alone-lora" "$@" ;;
  joined-full)
    train "${JOINED[@]}" --set hub.mode=full --set reader_checkpoint="$RUNS/alone-full" "$@" ;;
  no-context | no-aligned | no-back) # joined-lora without one path
    train "${JOINED[@]}" --set reader_checkpoint="$RUNS/alone-lora" \
      --set coupling."${STAGE#no-}"=false "$@" ;;
  score)
    RUN=$1
    shift
    $LAUNCH eval --checkpoint "$RUNS/$RUN" --views 8 --out "$RUNS/scores/$RUN" \
      --set evaluation.keep_candidates=true "$@" ;;
  *)
    echo "no stage $STAGE; the stages are at the top of this file" >&2
    exit 2 ;;
esac
