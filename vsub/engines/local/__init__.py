"""The embedded batch system: one job after another on this machine, with TORQUE's hooks and commands.

`client` holds qsub, qstat, qdel and qrerun, `server` the daemon, `mom` what happens around one job.
See docs/local.md for what is imitated and what differs on purpose.
"""
