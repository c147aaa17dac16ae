"""Training: credit, loss, loop; adapters and checkpoints. Imports torch only inside the modules that compute."""
