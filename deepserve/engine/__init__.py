"""The engine: a loop of schedule, execute, update, publish; its executors, its clients and its processes."""
