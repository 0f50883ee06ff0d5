"""SAT, the sparsity-aware Transformer: learn which blocks of the attention map matter, then train on those alone.

    layout.BlockLayout                     which blocks are kept
    reference                              SDDMM, sparse softmax, SpMM and block-sparse attention in plain PyTorch
    ops                                    the same as operators: CUDA kernels (csrc) on a GPU
    pattern, transition                    the sparsity parameter, and when to switch
    attention.get_attention(name)          "dense", "longformer", "bigbird", "lsg", "sat"
    baselines, gathered                    the four SAT is compared with, and their form in PyTorch's own products
    model.model_config, model.Encoder      the published model
    recipes.run_config, runs.fit           the published training
    datasets.prepare, datasets.load        the tasks
    experiments.rows, figures              what the notebooks measure and draw

Modules are imported by name: `from sat_lib.layout import BlockLayout`. Importing the package alone loads nothing.
"""
