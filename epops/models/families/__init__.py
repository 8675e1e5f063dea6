"""Families of transformers whose experts are not on its experts interface, one file each."""
