#!/bin/bash
#PBS -N ring
#PBS -l nodes=1:ppn=2,walltime=00:30:00
#PBS -vm img=debian-12,vms_per_node=2
#PBS -j oe
# A process on each vCPU of each guest of the job, without a host file and without a number.
mpirun ./ring
