"""The three phases of training.

recipe: what decides a run, as presets. transition: when the dense phase ends; evaluation: scores, and rules on them.
trainer: the steps; cuda_graph repeats them. pattern, saliency: which blocks are kept. fit, checkpoint: a run's folder.
"""
