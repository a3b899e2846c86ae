"""Several replicas and several workers train as one."""
