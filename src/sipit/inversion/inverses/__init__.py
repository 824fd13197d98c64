"""From states to scores for every token: what proposals read. Inference only, no training."""
