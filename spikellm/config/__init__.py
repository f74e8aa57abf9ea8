"""Every field of a run: its default, unit, meaning and check. Hydra's composed tree comes in, checked instances go out. No torch."""
