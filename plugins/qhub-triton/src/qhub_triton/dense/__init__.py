"""Dense weights of quantized ones, written in one pass, and the products of thousands of rows through them."""
