"""`python -m spikellm ..` is `spikellm ..`."""

from spikellm.run.cli import cli

if __name__ == "__main__":
    cli("python -m spikellm")
