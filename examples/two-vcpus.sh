#!/bin/sh
#PBS -N two-vcpus
#PBS -l nodes=1:ppn=2,walltime=00:10:00
#PBS -vm vcpus=2,ram=640M
# Asks for its guest in the script itself. qsub reads `-vm` as `-v m`, so the script can still be given to qsub.
echo "vCPUs: $(nproc)"
echo "MiB of RAM: $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)"
echo "node file:"
cat "$PBS_NODEFILE"
env | grep -E '^(DISTRO|VTORQUE_)' | sort
