"""SAT in pretrained encoders of transformers: where their weights are, and fine-tuning."""
