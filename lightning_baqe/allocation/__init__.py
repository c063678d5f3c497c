"""How sensitive the layers of a network are, and the bits that a budget is spent on best."""
