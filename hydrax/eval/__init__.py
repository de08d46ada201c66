"""What a trained model can do: perplexity, recall, extrapolation, scaling, and the baselines to beat."""
