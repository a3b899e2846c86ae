"""`fit`: the arguments, the batches, the compiled step, the loop around it, and the writing of the record."""
