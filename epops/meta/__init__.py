"""Fake kernels: sizes and dtypes from the arguments alone, never from a process group.

Each module also holds the checks of its ops' arguments; the real kernels run the same ones, so that eager and traced
calls give the same errors.
"""
