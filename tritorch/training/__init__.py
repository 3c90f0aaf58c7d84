"""A network trained beside its torch.nn twin, and what is left of the run: `tritorch train`."""
