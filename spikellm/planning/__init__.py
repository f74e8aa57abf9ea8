"""What a run will read, hold and take on this machine, told before it starts: from the shape of the model and one layer of it."""
