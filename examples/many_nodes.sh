#!/bin/sh
#SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8
# Train on many nodes. The run's folder must be on a disk that all of them see; the same command goes on after any interruption.
#
#     sbatch examples/many_nodes.sh experiment=internvl3_38b launch=fsdp2 data.path=pairs.jsonl run_dir=/shared/first
#
# Without Slurm, on each of the nodes (LAUNCHER: mpo, the default, torchrun or accelerate; GPUS: ranks on a node):
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/many_nodes.sh experiment=internvl3_38b ... run_dir=/shared/first
#     NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 examples/many_nodes.sh experiment=internvl3_38b ... run_dir=/shared/first
set -eu
[ $# -ge 1 ] || { sed -n 's/^#  *//p' "$0" >&2 && exit 2; }
if [ -n "${SLURM_JOB_ID:-}" ]; then # ranks and addresses come from the job
    exec srun --kill-on-bad-exit=1 mpo train "$@"
fi
port=${MASTER_PORT:-29500} gpus=${GPUS:-8}
case ${LAUNCHER:-mpo} in
mpo)
    exec mpo train "$@" launch.nproc_per_node="$gpus" \
        launch.nnodes="$NNODES" launch.node_rank="$NODE_RANK" launch.master_addr="$MASTER_ADDR" launch.master_port="$port"
    ;;
torchrun)
    exec torchrun --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$gpus" \
        --master-addr="$MASTER_ADDR" --master-port="$port" --module mpo train "$@"
    ;;
accelerate)
    exec accelerate launch --multi_gpu --num_machines="$NNODES" --machine_rank="$NODE_RANK" --num_processes=$((NNODES * gpus)) \
        --main_process_ip="$MASTER_ADDR" --main_process_port="$port" --mixed_precision=no --dynamo_backend=no --module mpo train "$@"
    ;;
*) echo "LAUNCHER must be mpo, torchrun or accelerate; got $LAUNCHER" >&2 && exit 2 ;;
esac
