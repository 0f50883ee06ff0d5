"""The encoder of the paper.

encoder: its configuration and modules. sparsity: the sparsity parameter W^P, its loss, its end. fused: fast parts with
the same parameters. baseline_options: what the attentions are given of the configuration.
"""
