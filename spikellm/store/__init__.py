"""Results of stages on disk, keyed by the content of all that they depend on; what a job reads, by content; the hub. No torch at import."""
