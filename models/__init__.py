"""Models: tensors in, tokens and frames out. Knows nothing of HTTP, Kubernetes or clouds."""
