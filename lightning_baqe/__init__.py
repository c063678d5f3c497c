"""Search bit-widths and compiler schedules together, train, lower to integers, compile, measure."""
__version__ = "0.1.0"
