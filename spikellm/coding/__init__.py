"""Codes: grain assignments, parameters, the tables that they spell, and the neuron that acts by a table."""
