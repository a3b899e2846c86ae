"""Looks into the model at a few steps of a run, which leave no trace in it."""
