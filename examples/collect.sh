#!/bin/sh
# A VM epilogue of a user's own: runs in the guest as the user, after the job's script. The guest's /tmp is lost with the guest.
cp /tmp/scratch/result "$HOME/result.txt"
