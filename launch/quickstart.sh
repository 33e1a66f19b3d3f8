#!/usr/bin/env bash
# Makes .venv, installs, fetches MovieLens 100K, fine-tunes on pipe 2 x data 2, evaluates, exports, recommends.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment ""

run_dir="${1:-runs/quickstart}"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
case "$gpus" in
  0) export DS_ACCELERATOR=cpu; ranks=4 pipe=2 ;;
  1) ranks=1 pipe=1 ;;
  2 | 3) ranks=2 pipe=2 ;;
  *) ranks=4 pipe=2 ;;
esac
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
echo "training on $ranks ranks (pipe $pipe x data $((ranks / pipe))), $gpus GPUs"
deepspeed --num_gpus "$ranks" --master_port "$port" launch/train.py \
  --deepspeed_config ds_configs/quickstart.json --set "recsys.pipe=$pipe" --run_dir "$run_dir" --overwrite
python launch/recommend.py "$run_dir/export" --data ml-100k --user 1
