"""Bit-widths learned by gradient (Schaefer et al.)."""
