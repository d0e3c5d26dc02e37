"""The pages of docs/evidence, rendered from the files in results/."""
