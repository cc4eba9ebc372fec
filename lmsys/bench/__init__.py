"""Experiments: each family sets up its points, checks them, measures them and returns tidy rows."""
