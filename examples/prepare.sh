#!/bin/sh
# A VM prologue of a user's own: runs in the guest as the user, before the job's script. Another status than 0 ends the job.
echo "prepared on $(hostname) by $(id -un)"
mkdir -p /tmp/scratch
