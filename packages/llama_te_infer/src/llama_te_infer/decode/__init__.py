"""Steps of one token for each row: by the fused kernels, or by the model's layers."""
