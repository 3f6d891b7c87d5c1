"""Solvers: pure functions from a weight and the statistics of its input to codes on a grid."""
