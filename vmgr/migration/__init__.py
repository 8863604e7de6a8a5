"""Moving a site over from the vTorque of 2018, which was written in bash: its configuration becomes one of ours."""
