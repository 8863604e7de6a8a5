"""The report of a job: what each node and each guest did when, kept by the agents, gathered, and shown."""
