"""SAT in pretrained encoders of transformers.

sparse_attention: the three phases for any of them. encoders: loading, inputs, attention maps; weights: where these are.
finetune: fine-tuning, dense or with SAT. cifar_vit: how the small ViT of data/pretrained is made.
"""
