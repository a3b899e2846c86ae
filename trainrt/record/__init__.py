"""What a run writes down, and `Run`, which reads it back. NumPy and TensorBoard's protos, never TensorFlow."""
