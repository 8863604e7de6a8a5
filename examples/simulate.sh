#!/bin/bash
#PBS -N simulate
#PBS -l walltime=00:20:00
#PBS -j oe
# Computes until the file `stop` is there; how far it is stands in /tmp of its guest.
touch running
for ((step = 1; step <= 2000; step++)); do
    echo "step $step" >>/tmp/progress.log
    [ ! -e stop ] || break
    sleep 0.5
done
echo "stopped"
