"""Products with the weights of fused experts: one launch for all experts that a batch of tokens goes to."""
