#!/bin/bash
#PBS -N hello
#PBS -l walltime=00:10:00
# A batch job as any other. `vsub hello.sh` runs it in a virtual machine, `qsub hello.sh` on the bare node.
echo "Hello from $(id -un) (uid $(id -u)) in $(pwd)"
echo "guest: $(hostname), image ${VTORQUE_IMAGE:-none}, $(nproc) vCPU, $(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) MiB"
echo "kernel: $(uname -sr)"
echo "made in $(hostname)" >hello.txt
