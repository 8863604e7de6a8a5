#!/bin/sh
#PBS -N scratch
#PBS -j oe
# Works in the guest's own /tmp; prepare.sh makes the folder and collect.sh brings the result home.
seq 1000 | awk '{sum += $1} END {print "sum:", sum}' >/tmp/scratch/result
echo "the guest has its own /tmp: $(ls /tmp/scratch)"
