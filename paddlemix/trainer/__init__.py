"""Fine-tuning on PaddleNLP's Trainer; import from the modules."""
