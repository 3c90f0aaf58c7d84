"""Measurements, and what is written down beside them; installed as `tritorch.bench`."""
