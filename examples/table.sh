#!/bin/bash
#PBS -N table
#PBS -j oe
# Works on what mean.sh has left.
sed 's/^/last run: /' mean.txt >table.txt
