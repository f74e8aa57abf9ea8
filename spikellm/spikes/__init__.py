"""Spikes, synaptic operations and energy of a real run, site by site."""
