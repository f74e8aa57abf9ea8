"""A spiking block brought back to what its ANN computes, one after the other on the spiking stream: what codes alone cannot do."""
