"""Convert a pretrained LLaMA-family model to a spiking one: `python main.py --help`."""

from spikellm.run.cli import cli

if __name__ == "__main__":
    cli("python main.py")
