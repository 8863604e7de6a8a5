#!/bin/bash
#PBS -N sweep
#PBS -t 1-3
#PBS -j oe
# A member of a job array for each index, each in a guest of its own.
x=$PBS_ARRAYID
echo "f($x) = $((x * x + 1))" >"sweep.$x"
