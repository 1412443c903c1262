#!/bin/sh
# Checks and times training on one GPU, in about half an hour: make gpu
# Figures are written to runs/gpu/. Needs open_clip (the extra `open_clip`) for the comparison.
set -eu
here=$(dirname "$0")
out=runs/gpu
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"

python "$here/gpu_check.py" 2>&1 | tee "$out/check.txt" || echo "some checks failed: see $out/check.txt"

for image in vit_base_patch32_224 vit_base_patch16_224; do
  for batch in 256 1024 4096; do
    python "$here/gpu_step.py" --image "$image" --batch "$batch" --steps 20 --out "$out/$image-$batch.json"
  done
done 2>&1 | tee "$out/steps.txt"

# The command itself, with its loaders: images of 224 pixels from disk, all towers trained.
scenes=runs/scenes-gpu
python -c "from pathlib import Path; from clip_lightning.data.scenes import write_scenes
write_scenes(Path('$scenes'), count=20000, size=224, seed=0)"
clip-lightning fit --data.root "scenes:$scenes" --data.batch_size 1024 --data.cache off --trainer.max_epochs 4 \
  --model.freeze none --model.image_tower random:vit_base_patch32_224 --model.text_tower pypi:minilm-l6 \
  2>&1 | tee "$out/command.txt"

# Heads on frozen towers: the features are computed in the first run and read in the second.
for run in cold warm; do
  clip-lightning fit --config heads --data.root "scenes:$scenes" --data.cache "$out/features" \
    2>&1 | tee "$out/heads-$run.txt"
done
