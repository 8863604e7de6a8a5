"""The embedded batch system: one job after another on this machine, with TORQUE's hooks and commands.

`qsub`, `qstat` and `client` hold the clients, `daemon` and `server` the daemon, `mom` what happens around one
job. See docs/local.md for what is imitated and what differs on purpose.
"""
