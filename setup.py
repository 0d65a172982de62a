"""Everything is said in pyproject.toml. The CUDA part will be built from here, without importing torch; there is none yet."""

from setuptools import setup

setup()
