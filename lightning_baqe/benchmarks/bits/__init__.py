"""Claims about bit allocation: the solver, sensitivities, and what comes of them."""
