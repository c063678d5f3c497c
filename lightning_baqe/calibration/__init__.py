"""What data without labels set: activation ranges, and corrections of weights and biases without training."""
