"""Everything is said in pyproject.toml. A CUDA part, when there is one, is built from here without importing torch."""

from setuptools import setup

setup()
