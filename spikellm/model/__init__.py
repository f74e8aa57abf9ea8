"""The pretrained model and its conversion: places, loading, rotation, slots, attention, prefix, neurons into slots, checkpoints.

What transformers calls things is known here and nowhere else.
"""
