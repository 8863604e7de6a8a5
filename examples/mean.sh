#!/bin/bash
#PBS -N mean
#PBS -j oe
# Reads a file in the directory of submission and leaves its result there: the home is the same as outside of the guest.
awk '{ sum += $1 } END { printf "%d numbers, mean %.1f\n", NR, sum / NR }' numbers.txt >mean.txt
echo "read by $(id -un) on $(hostname)"
