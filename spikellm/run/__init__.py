"""The command line, a job, its stages and what they share, sweeps, tracking."""
