"""The encoder of the paper: PyTorch's modules, the sparsity parameter, and the fast layers."""
