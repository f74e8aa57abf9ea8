"""The suite: a folder for each room of the package; here what crosses rooms, and what tests share."""
