#!/bin/sh
#PBS -N status
# Ends with a status of its own, which comes back as the job's; TERM (from qdel) is told to the script in the guest.
trap 'echo "told to end"; exit 9' TERM
echo "this goes to the output file"
echo "this goes to the error file" >&2
exit 3
