#!/bin/bash
#PBS -N careful
#PBS -l walltime=00:00:05
#PBS -j oe
# Saves what it has when its time is up, or when it is deleted: then the script gets TERM, and some seconds later KILL.
n=0
trap 'echo "$n steps" >checkpoint.txt; exit 3' TERM
while :; do
    n=$((n + 1))
    sleep 0.1
done
