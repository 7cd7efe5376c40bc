#!/bin/bash
# @config@ on @devices@ GPUs of @hosts@ nodes, mesh @mesh@.
# Made by: @made@
#SBATCH --job-name=@job@
#SBATCH --nodes=@hosts@
#SBATCH --ntasks-per-node=@per_host@
#SBATCH --gres=gpu:@per_host@
#SBATCH --signal=TERM@90
#SBATCH --requeue
# (with --gpus-per-task=1 each process would see one GPU, and look for others)
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it by sbatch, in the folder of cir_jax}"
srun @command@
