"""The mathematics of quantization: ranges, scales, rounding, errors. Torch tensors in, torch tensors out."""
