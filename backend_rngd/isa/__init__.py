"""The instruction set: descriptors (what an instruction says), their text, their binary tables and their legality.

This package is the contract between compiler and simulator. It imports numpy only.
"""
